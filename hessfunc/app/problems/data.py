"""Labelled images as tensors: digits of scikit-learn, MNIST, and CIFAR-10 in two layouts."""

from __future__ import annotations

import gzip
import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from hessfunc.training.examples import Examples

Split = Literal["train", "test"]
CIFAR10_MEAN = (0.485, 0.456, 0.406)
CIFAR10_STD = (0.229, 0.224, 0.225)

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081

_CIFAR10_LAYOUTS = (
    "a folder cifar-10-batches-py (unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz)"
    " or an .npz file with x_test uint8 [N, 32, 32, 3] and y_test [N]"
)

_MNIST_LAYOUT = (
    "a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, or these as .gz (https://ossci-datasets.s3.amazonaws.com/mnist/)"
)


def data_root() -> Path | None:
    """Return the folder in the environment variable HESSFUNC_DATA, or None if it is not set."""
    root = os.environ.get("HESSFUNC_DATA")
    return Path(root).expanduser() if root else None


def digits() -> Examples:
    """Return scikit-learn's 1797 handwritten digits: inputs ``[1797, 1, 8, 8]`` in [0, 1].

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the digits require scikit-learn: pip install 'hessfunc[data]'"
        ) from None
    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().div(16).reshape(-1, 1, 8, 8)
    return Examples(inputs, torch.from_numpy(labels).long())


def digits_apart() -> tuple[Examples, Examples]:
    """Return 1500 digits to train on, and the last 297, which other people have written."""
    written = digits()
    return written[:1500], written[1500:]


def cifar10(path: str | Path | None = None, split: Split = "test") -> Examples:
    """Return CIFAR-10 (Krizhevsky 2009): inputs ``[N, 3, 32, 32]`` with normalised channels.

    Args:
        path: Path to an .npz file with ``x_{split}`` and ``y_{split}``, to the folder
            ``cifar-10-batches-py`` of the Python version, or to a folder that contains either of
            them, directly or in a subfolder ``cifar10``. None for the folder HESSFUNC_DATA.
        split: Split: the 10,000 test images or the 50,000 training images. An .npz file may
            contain fewer.

    Raises:
        FileNotFoundError: If the path contains neither.
        ValueError: If a file is damaged, or its arrays have other shapes or dtypes.
    """
    root = data_root() if path is None else Path(path).expanduser()
    if root is None:
        raise FileNotFoundError(
            f"no path to CIFAR-10: pass a path or set HESSFUNC_DATA; expected {_CIFAR10_LAYOUTS}"
        )
    for place in (root, root / "cifar10"):
        arrays = _read_npz(place, split) or _read_batches(place, split)
        if arrays is not None:
            images, labels = arrays
            return Examples(_normalised(images), torch.from_numpy(labels).long())
    layouts = _CIFAR10_LAYOUTS.replace("_test", f"_{split}")
    raise FileNotFoundError(f"no CIFAR-10 ({split}) at {root}: expected {layouts}")


def mnist(path: str | Path | None = None, split: Split = "train") -> Examples:
    """Return MNIST (LeCun, Cortes, Burges 1998): normalised inputs ``[N, 1, 28, 28]``.

    Args:
        path: Path to a folder with the four idx files, unpacked or as .gz, directly or in a
            subfolder ``mnist`` or ``MNIST/raw``. None for the folder HESSFUNC_DATA.
        split: Split: the 60,000 training images or the 10,000 test images.

    Raises:
        FileNotFoundError: If the folder does not contain the files.
        ValueError: If a file is damaged.
    """
    root = data_root() if path is None else Path(path).expanduser()
    if root is None:
        raise FileNotFoundError(
            f"no path to MNIST: pass a path or set HESSFUNC_DATA; expected {_MNIST_LAYOUT}"
        )
    stem = "train" if split == "train" else "t10k"
    for place in (root, root / "mnist", root / "MNIST" / "raw"):
        images = _idx(place / f"{stem}-images-idx3-ubyte", 3)
        labels = _idx(place / f"{stem}-labels-idx1-ubyte", 1)
        if images is not None and labels is not None:
            if len(images) != len(labels):
                raise ValueError(f"{place} has {len(images)} images and {len(labels)} labels")
            pixels = torch.from_numpy(images).unsqueeze(1).float().div(255)
            inputs = (pixels - MNIST_MEAN).div(MNIST_STD)
            labels = _of_ten_classes(place, labels)
            return Examples(inputs, torch.from_numpy(labels).long())
    raise FileNotFoundError(f"no MNIST ({split}) at {root}: expected {_MNIST_LAYOUT}")


def small_digits(count: int, root: Path | None, /) -> tuple[Examples, Examples]:
    """Return training and test digits for problems that take seconds.

    They are MNIST, averaged to 14 x 14 pixels, if the folder contains it. Otherwise they are 1,200
    and 597 of scikit-learn's digits.

    Args:
        count: Number of training images of MNIST.
        root: Folder that may contain MNIST, such as `data_root`.
    """
    if root is None or not (root / "mnist").is_dir():
        images = digits()
        return images[:1200], images[1200:]
    train, test = mnist(root)[:count], mnist(root, "test")
    return _halved(train), _halved(test)


def _halved(images: Examples) -> Examples:
    return Examples(avg_pool2d(images.inputs, 2), images.targets)


def _idx(file: Path, axes: int) -> np.ndarray | None:
    """Return the bytes of an idx file or of its .gz as an array, or None if neither exists."""
    packed = file.with_name(file.name + ".gz")
    if not (file.is_file() or packed.is_file()):
        return None
    try:
        content = file.read_bytes() if file.is_file() else gzip.decompress(packed.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{packed} is damaged: {error}") from None
    # The third byte is the type (8: unsigned bytes), and the fourth is the number of axes. The
    # lengths of the axes follow, big-endian.
    head = 4 + 4 * axes
    shape = np.frombuffer(content[4:head], ">u4").tolist()
    body = content[head:]
    if content[:4] != bytes([0, 0, 8, axes]) or len(body) != math.prod(shape):
        raise ValueError(
            f"{file} is damaged: it is not a complete idx file of unsigned bytes with {axes} axes"
        )
    return np.frombuffer(bytearray(body), np.uint8).reshape(shape)


def _normalised(images: np.ndarray) -> Tensor:
    """Convert uint8 ``[N, 32, 32, 3]`` to normalised float32 ``[N, 3, 32, 32]``."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    mean, std = (pixels.new_tensor(c).reshape(1, 3, 1, 1) for c in (CIFAR10_MEAN, CIFAR10_STD))
    return (pixels - mean).div(std).contiguous()


def _read_npz(place: Path, split: Split) -> tuple[np.ndarray, np.ndarray] | None:
    """Read the first .npz file in the folder (or the file itself) that contains the split."""
    files = [place] if place.suffix == ".npz" and place.is_file() else sorted(place.glob("*.npz"))
    for file in files:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{file} is damaged: it is not an .npz file")
        with np.load(file, allow_pickle=False) as arrays:
            if {f"x_{split}", f"y_{split}"} <= set(arrays.files):
                try:
                    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
                except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"{file} is damaged: {error}") from error
                return _checked(file, images, labels)
    return None


def _checked(file: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the labels ``[N]``, after checking shapes, dtypes and classes."""
    if (
        images.dtype != np.uint8
        or images.shape[1:] != (32, 32, 3)
        or labels.dtype.kind not in "iu"
        or labels.shape not in ((len(images),), (len(images), 1))
    ):
        raise ValueError(
            f"{file} has images {images.dtype} {list(images.shape)} and labels {labels.dtype} "
            f"{list(labels.shape)}: expected uint8 [N, 32, 32, 3] and integers [N]"
        )
    return images, _of_ten_classes(file, labels.reshape(-1))


def _of_ten_classes(file: Path, labels: np.ndarray) -> np.ndarray:
    if labels.size and not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(
            f"{file} has labels from {labels.min()} to {labels.max()}: expected 0 to 9"
        )
    return labels


def _read_batches(place: Path, split: Split) -> tuple[np.ndarray, np.ndarray] | None:
    """Read the pickled batches of the Python version, in the folder or its cifar-10-batches-py."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    for folder in (place, place / "cifar-10-batches-py"):
        if all((folder / name).is_file() for name in names):
            images, labels = zip(*(_read_batch(folder / name) for name in names), strict=True)
            return np.concatenate(images), np.concatenate(labels)
    return None


def _read_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(file)
    try:
        rows, labels = np.asarray(content["data"]), np.asarray(content["labels"])
        images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a batch of CIFAR-10: expected a dict with data uint8 [N, 3072] and "
            "labels [N]"
        ) from error
    return _checked(file, images, labels)


class _ArraysOnly(pickle.Unpickler):
    """Unpickler restricted to NumPy arrays and plain containers, because pickles can run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        try:
            return allowed[module.rpartition(".")[2], name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in CIFAR-10") from None


def _unpickle(file: Path) -> Any:
    with file.open("rb") as stream:
        # Python 2 wrote the file, and its strings are bytes: latin1 maps each byte to a character.
        try:
            return _ArraysOnly(stream, encoding="latin1").load()
        except Exception as error:
            raise ValueError(f"{file} is damaged: {error}") from error
