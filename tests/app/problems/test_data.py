import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from hessfunc.app.problems import data
from tests.datapath import data_file


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)


def write_batch(file: Path, images: np.ndarray, labels: list[int]) -> None:
    """A batch in CIFAR-10's own layout: channels first, one row an image."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    file.write_bytes(pickle.dumps({"data": rows, "labels": labels}, protocol=4))


def test_digits_are_images_in_the_unit_interval() -> None:
    pytest.importorskip("sklearn")
    digits = data.digits()
    assert digits.inputs.shape == (1797, 1, 8, 8)
    assert digits.inputs.min() == 0
    assert digits.inputs.max() == 1
    assert digits.targets.unique().tolist() == list(range(10))


def test_small_digits_are_means_of_four_pixels_of_mnist(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    train, test = data.small_digits(50, tmp_path)
    assert (train.inputs.shape, len(test)) == ((1200, 1, 8, 8), 597)
    root = data_file("mnist").parent
    train, test = data.small_digits(50, root)
    assert (len(train), len(test)) == (50, 10_000)
    image = data.mnist(root, "test").inputs[7, 0]
    corner = image[10:12, 14:16].mean()
    torch.testing.assert_close(test.inputs[7, 0, 5, 7], corner)


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_layouts_of_cifar10_read_the_same(
    tmp_path: Path, images: np.ndarray, split: data.Split
) -> None:
    labels = list(range(10))
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    write_batch(batches / "test_batch", images, labels)
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        write_batch(batches / f"data_batch_{i + 1}", images[part], labels[part])
    npz = tmp_path / "npz" / "cifar10.npz"
    npz.parent.mkdir()
    np.savez(npz, **{f"x_{split}": images, f"y_{split}": np.array(labels)})

    pixel = images[3, 5, 7].astype(np.float64) / 255
    expected = (pixel - data.CIFAR10_MEAN) / data.CIFAR10_STD
    for path in (batches, tmp_path, npz, npz.parent):
        examples = data.cifar10(path, split)
        assert examples.inputs.shape == (10, 3, 32, 32)
        assert examples.inputs.dtype == torch.float32
        assert examples.targets.tolist() == labels
        np.testing.assert_allclose(examples.inputs[3, :, 5, 7], expected, rtol=1e-5)


def test_a_batch_written_by_python_2_is_read(tmp_path: Path) -> None:
    rows = np.arange(3072, dtype=np.uint8).reshape(1, -1)
    # Protocol 2 with bytes as BINSTRING (T) and NumPy's module of that time.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01"
        b"(K\x01M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + rows.tobytes() + b"tb"
    )
    content = b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x07eu."
    (tmp_path / "test_batch").write_bytes(content)
    examples = data.cifar10(tmp_path)
    assert examples.targets.tolist() == [7]
    assert examples.inputs[0, 0, 0, 1] == pytest.approx((1 / 255 - 0.485) / 0.229)


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(Path("elsewhere")))
    with pytest.raises(ValueError, match=r"test_batch is damaged: .* is not allowed in CIFAR-10"):
        data.cifar10(tmp_path)


def test_half_of_a_batch_is_named(tmp_path: Path, images: np.ndarray) -> None:
    write_batch(tmp_path / "test_batch", images, list(range(10)))
    content = (tmp_path / "test_batch").read_bytes()
    (tmp_path / "test_batch").write_bytes(content[:500])
    with pytest.raises(ValueError, match="test_batch is damaged"):
        data.cifar10(tmp_path)


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ROWS, [0, 1]], "is not a batch of CIFAR-10: expected a dict with data"),
        ({"data": ROWS}, "is not a batch of CIFAR-10"),
        ({"labels": [0, 1]}, "is not a batch of CIFAR-10"),
        ({"data": ROWS[:, 1:], "labels": [0, 1]}, "is not a batch of CIFAR-10"),
        ({"data": ROWS, "labels": [[0], [1, 2]]}, "is not a batch of CIFAR-10"),
        ({"data": ROWS / 2, "labels": [0, 1]}, r"has images float64 \[2, 32, 32, 3\]"),
        ({"data": ROWS, "labels": [0, 1, 2]}, r".* and labels int64 \[3\]: expected"),
        ({"data": ROWS, "labels": ["cat", "dog"]}, ".* and labels <U3"),
        ({"data": ROWS, "labels": [0.0, 1.0]}, ".* and labels float64"),
        ({"data": ROWS, "labels": [0, 10]}, "has labels from 0 to 10: expected 0 to 9"),
        ({"data": ROWS, "labels": [-1, 9]}, "has labels from -1 to 9"),
    ],
)
def test_a_batch_of_other_content_is_named(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(ValueError, match=rf"test_batch {message}"):
        data.cifar10(tmp_path)


def test_pickled_and_damaged_arrays_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    file = tmp_path / "cifar10.npz"
    np.savez(file, x_test=images, y_test=np.array([None] * 10))
    with pytest.raises(ValueError, match=r"cifar10.npz is damaged: Object arrays"):
        data.cifar10(file)
    np.savez(file, x_test=images, y_test=np.arange(10))
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10.npz is damaged: Bad CRC"):
        data.cifar10(file)


def test_arrays_that_are_no_such_images_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    file, labels = tmp_path / "cifar10.npz", np.arange(10)
    for wrong in (images.transpose(0, 3, 1, 2), images / 255):
        np.savez(file, x_test=wrong, y_test=labels)
        with pytest.raises(ValueError, match=r"cifar10.npz has images .* expected uint8"):
            data.cifar10(file)
    np.savez(file, x_test=images, y_test=labels[:, None])
    assert data.cifar10(file).targets.tolist() == labels.tolist()
    with pytest.raises(FileNotFoundError, match="with x_train uint8"):
        data.cifar10(tmp_path, "train")


def test_missing_cifar10_says_what_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py .*cs\.toronto\.edu.* \.npz"):
        data.cifar10(tmp_path)
    monkeypatch.delenv("HESSFUNC_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set HESSFUNC_DATA"):
        data.cifar10()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar10.npz").write_bytes(b"half of a download")
    with pytest.raises(ValueError, match="cifar10.npz is damaged"):
        data.cifar10(tmp_path)


def test_the_environment_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESSFUNC_DATA", str(data_file("cifar10").parent))
    assert len(data.cifar10()) == 1000


def idx(array: np.ndarray) -> bytes:
    """In the format of MNIST."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, count: int = 6) -> np.ndarray:
    """Train as it is, and test packed; the images are random."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels[::-1])))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[::-1])))
    return pixels


@pytest.mark.parametrize("below", [".", "mnist", "MNIST/raw"])
def test_mnist_is_read_packed_or_not(tmp_path: Path, below: str) -> None:
    pixels = write_mnist(tmp_path / "it" / below if below != "." else tmp_path / "it")
    for split, order in (("train", 1), ("test", -1)):
        examples = data.mnist(tmp_path / "it", split)
        assert examples.inputs.shape == (6, 1, 28, 28)
        assert examples.targets.tolist() == list(range(6))[::order]
        expected = (pixels[::order].astype(np.float64) / 255 - data.MNIST_MEAN) / data.MNIST_STD
        np.testing.assert_allclose(examples.inputs[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_missing_mnist_says_what_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*\.gz \(https://"):
        data.mnist(tmp_path)
    monkeypatch.delenv("HESSFUNC_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set HESSFUNC_DATA"):
        data.mnist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            b"\0\0\x08\x03" + bytes(12) + b"more",
            "not a complete idx file",
        ),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + bytes(12), "unsigned bytes with 3 axes"),
        ("train-images-idx3-ubyte", b"", "unsigned bytes with 3 axes"),
        ("train-labels-idx1-ubyte", idx(np.arange(5)), "6 images and 5 labels"),
        ("train-labels-idx1-ubyte", idx(np.arange(5, 11)), "labels from 5 to 10: expected 0 to 9"),
    ],
)
def test_damaged_mnist_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.mnist(tmp_path)


@pytest.mark.parametrize("cut", [9, 100])
def test_half_of_a_download_is_named(tmp_path: Path, cut: int) -> None:
    write_mnist(tmp_path / "mnist")
    file = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is damaged"):
        data.mnist(tmp_path, "test")


def test_mnist_in_full() -> None:
    data_file("mnist")
    examples = data.mnist(data_file("mnist"), "test")
    assert examples.targets[:5].tolist() == [7, 2, 1, 0, 4]
    assert len(examples) == 10_000
