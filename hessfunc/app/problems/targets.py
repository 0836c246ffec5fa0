"""What `hessfunc analyze` analyses: named problems, and the user's own functions."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc import functional, microbatches, supervised
from hessfunc.app.problems import data, resnet
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.nets import digits_convnet
from hessfunc.containers import mapped
from hessfunc.losses import LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.examples import examples
from hessfunc.trees import Tree, tree_map

DIGITS_EPOCHS = 8

# The last 297 digits are held out; other people wrote them.
_DIGITS_TRAINED_ON = 1500


class TargetError(ValueError):
    """A target that cannot be analysed, for a reason that its author can mend."""


@dataclass(frozen=True)
class Problem:
    """A loss, the point at which its curvature is taken, and the data.

    Attributes:
        loss: ``(params, batch) -> scalar``.
        params: a tree of tensors.
        batches: any re-iterable of batches.
    """

    loss: LossFunction
    params: Tree
    batches: Iterable[Any]

    def evaluate(self) -> tuple[float, int, int]:
        """The mean loss over all examples, the number of these, and the number of batches.

        Raises:
            TargetError: there is no example, or the loss of a batch is no finite scalar.
        """
        total, count, batches = 0.0, 0, 0
        with torch.no_grad():
            for batch in self.batches:
                size = examples(batch)
                value = self.loss(self.params, batch)
                if not isinstance(value, Tensor) or value.dim() > 0:
                    what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise TargetError(f"the loss of a batch must be a scalar tensor, not {what}")
                if not value.isfinite():
                    raise TargetError(f"the loss is {float(value)} on a batch of {size} examples")
                total += size * float(value)
                count += size
                batches += 1
        if not count:
            raise TargetError("the loader is empty")
        return total / count, count, batches


@dataclass(frozen=True)
class Batches:
    """The batches of a loader on one device, in one floating-point dtype, at most of some size.

    None leaves the device, the dtype or the size as it is.
    """

    loader: Iterable[Any]
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    size: int | None = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            batch = mapped(lambda leaf: _placed(leaf, self.device, self.dtype), batch, "batch")
            yield from [batch] if self.size is None else microbatches(batch, self.size)


def _placed(leaf: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)


def first(batches: Iterable[Any], count: int) -> list[Any]:
    """The batches with the first ``count`` examples, or with all where there are fewer."""
    found: list[Any] = []
    for batch in batches:
        size = examples(batch)
        if size >= count:
            return [*found, microbatches(batch, count)[0]]
        found.append(batch)
        count -= size
    return found


def digits(
    *, seed: int = 0, on_epoch: Callable[[int, float], None] | None = None
) -> tuple[nn.Module, Callable[..., Tensor], list[Any]]:
    """A small conv net, trained on 1500 of scikit-learn's digits, and these digits.

    Args:
        seed: of the training.
        on_epoch: called with the number of finished epochs, of `DIGITS_EPOCHS`, and the mean loss.
    """
    seen = data.digits()[:_DIGITS_TRAINED_ON]
    model = train(digits_convnet, seen, epochs=DIGITS_EPOCHS, lr=0.05, seed=seed, on_epoch=on_epoch)
    return model, F.cross_entropy, seen.batches(500)


def cifar10(
    images: Path | None = None, weights: Path | None = None
) -> tuple[nn.Module, Callable[..., Tensor], list[Any]]:
    """A trained ResNet-20, in eval mode, and CIFAR-10's test images.

    Args:
        images: as `hessfunc.app.problems.data.cifar10` takes it.
        weights: the checkpoint; by default ``resnet20_cifar10/resnet20-12fca82f.th`` in the folder
            HESSFUNC_DATA.

    Raises:
        FileNotFoundError: the images or the weights are not there.
    """
    if weights is None:
        root = data.data_root()
        if root is None:
            raise FileNotFoundError(
                "no path to the weights of the ResNet-20: give one, or set HESSFUNC_DATA; expected "
                f"{resnet.WEIGHTS_SOURCE}"
            )
        weights = root / "resnet20_cifar10" / "resnet20-12fca82f.th"
    model = resnet.resnet(20).eval()
    state = resnet.load_weights(weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold the weights of a CIFAR ResNet-20") from error
    return model, F.cross_entropy, data.cifar10(images).batches(100)


def imported(target: str) -> Any:
    """What the user's ``module:function`` returns; the current directory is importable.

    Raises:
        TargetError: it cannot be imported or called.
    """
    module_name, _, function_name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise TargetError(f"importing {module_name} failed: {_one_line(error)}") from error
        raise TargetError(
            f"cannot import {error.name!r}: it is neither in {here} nor installed"
        ) from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"importing {module_name} failed: {_one_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise TargetError(f"{module_name} ({module.__file__}) has no function {function_name!r}")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise TargetError(f"{target} failed: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return message
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({frame.filename}, line {frame.lineno})"


def make_problem(
    target: str,
    returned: Any,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    count: int | None = None,
    batch_size: int | None = None,
) -> Problem:
    """The problem of what a target returns.

    Args:
        target: its name, for messages.
        returned: ``(model, criterion, loader)`` or ``(loss, params, batches)``.
        device: where to; by default nothing moves.
        dtype: of parameters and floating-point inputs; by default nothing is converted.
        count: how many examples to take, at most.
        batch_size: larger batches are cut into pieces of so many examples.

    Raises:
        TargetError: it is neither.
    """
    expected = "(model, criterion, loader) or (loss, params, batches)"
    if not isinstance(returned, tuple) or len(returned) != 3:
        size = f" of length {len(returned)}" if isinstance(returned, tuple) else ""
        raise TargetError(f"{target} must return {expected}, not {type(returned).__name__}{size}")
    head, middle, batches = returned
    if not callable(head) or not hasattr(batches, "__iter__"):
        kinds = ", ".join(type(part).__name__ for part in returned)
        raise TargetError(f"{target} must return {expected}, not ({kinds})")

    if count is None and iter(batches) is batches:
        raise TargetError(
            f"{target} returned batches that can be read only once ({type(batches).__name__}): "
            "return a list or a DataLoader"
        )
    try:
        if isinstance(head, nn.Module):
            if not callable(middle):
                raise TypeError(f"its criterion, of type {type(middle).__name__}, cannot be called")
            if getattr(middle, "reduction", "mean") == "sum":
                raise ValueError("its criterion is a sum, and batches are averaged: take the mean")
            if isinstance(middle, nn.Module):
                middle.to(device=device, dtype=dtype)
            model_fn, params = functional(head.to(device=device, dtype=dtype))
            loss: LossFunction = supervised(model_fn, middle)
        else:
            loss = head
            params = tree_map(lambda leaf: _placed(leaf, device, dtype), middle)
            space_of(params)
    except (TypeError, ValueError) as error:
        raise TargetError(f"{target} must return {expected}: {error}") from error
    moved = Batches(batches, device, dtype, batch_size)
    return Problem(loss, params, moved if count is None else first(moved, count))
