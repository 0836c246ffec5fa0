"""Targets of `hessfunc analyze`: named problems and the user's own functions."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIGITS_EPOCHS = 8


class TargetError(ValueError):
    """Error of a target that its author can fix."""


@dataclass(frozen=True)
class Problem:
    """Loss, parameters at which its curvature is taken, and data.

    Attributes:
        loss: Function ``(params, batch) -> scalar``.
        params: Tree of tensors.
        batches: Iterable of batches that can be iterated over repeatedly.
    """

    loss: LossFunction
    params: Tree
    batches: Iterable[Any]

    def evaluate(self) -> tuple[float, int, int]:
        """Return the mean loss over all examples, the number of examples, and that of batches.

        Raises:
            TargetError: If there are no examples, or the loss of a batch is not a finite scalar.
        """
        total, count, batches = 0.0, 0, 0
        with torch.no_grad():
            for batch in self.batches:
                size = examples(batch)
                value = self.loss(self.params, batch)
                if not isinstance(value, Tensor) or value.dim() > 0:
                    kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise TargetError(f"the loss of a batch must be a scalar tensor, not {kind}")
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
    """Batches of a loader, moved to a device, converted to a dtype, and split to a maximum size.

    Attributes:
        loader: Iterable of batches.
        device: Device of all tensors; None to keep it.
        dtype: Dtype of floating-point tensors; None to keep it.
        size: Maximum number of examples per batch; None to keep the batches.
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
    """Return batches with the first ``count`` examples, or with all if there are fewer."""
    chosen: list[Any] = []
    for batch in batches:
        size = examples(batch)
        if size >= count:
            return [*chosen, microbatches(batch, count)[0]]
        chosen.append(batch)
        count -= size
    return chosen


def digits(
    *, seed: int = 0, on_epoch: Callable[[int, float], None] | None = None
) -> tuple[nn.Module, Callable[..., Tensor], list[Any]]:
    """Train a small conv net on 1500 of scikit-learn's digits.

    Args:
        seed: Seed of the training.
        on_epoch: Function that is called with the number of finished epochs, out of
            `DIGITS_EPOCHS`, and the mean loss.

    Returns:
        Model in eval mode, criterion, and batches of the training digits.
    """
    seen, _ = data.digits_apart()
    model = train(digits_convnet, seen, epochs=DIGITS_EPOCHS, lr=0.05, seed=seed, on_epoch=on_epoch)
    return model, F.cross_entropy, seen.batches(500)


def cifar10(
    images: Path | None = None, weights: Path | None = None
) -> tuple[nn.Module, Callable[..., Tensor], list[Any]]:
    """Return a trained ResNet-20 and the test images of CIFAR-10.

    Args:
        images: Path to CIFAR-10, as in `hessfunc.app.problems.data.cifar10`.
        weights: Path to the checkpoint; None for ``resnet20_cifar10/resnet20-12fca82f.th`` in the
            folder HESSFUNC_DATA.

    Returns:
        Model in eval mode, criterion, and batches of the test images.

    Raises:
        FileNotFoundError: If the images or the weights do not exist.
        ValueError: If the checkpoint contains other weights.
    """
    if weights is None:
        root = data.data_root()
        if root is None:
            raise FileNotFoundError(
                "no path to the weights of the ResNet-20: pass one, or set HESSFUNC_DATA; expected "
                f"{resnet.WEIGHTS_SOURCE}"
            )
        weights = root / "resnet20_cifar10" / "resnet20-12fca82f.th"
    expected = f"pass {resnet.WEIGHTS_SOURCE}"
    model = resnet.with_weights(resnet.resnet(20), weights, "CIFAR ResNet-20", expected).eval()
    return model, F.cross_entropy, data.cifar10(images).batches(100)


def imported(target: str) -> Any:
    """Call the user's ``module:function``, which may be in the current directory.

    Raises:
        TargetError: If the function cannot be imported, or fails.
    """
    return called(target, function_of(target))


def function_of(target: str, /) -> Callable[..., Any]:
    """Import the user's ``module:function``, which may be in the current directory.

    Raises:
        TargetError: If the function cannot be imported.
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
    return function


def called(target: str, function: Callable[..., Any], /, *arguments: Any) -> Any:
    """Call a function of the user.

    Raises:
        TargetError: If the function takes other arguments, or fails.
    """
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        due = "take one argument, as in `def training(track):`" if arguments else "take no argument"
        raise TargetError(f"{target} must {due}: {error}") from error
    try:
        return function(*arguments)
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
    mesh: DeviceMesh | None = None,
    shard: Sequence[str] | None = None,
) -> Problem:
    """Build the problem from the return value of a target.

    Args:
        target: Name of the target, for error messages.
        returned: Tuple ``(model, criterion, loader)`` or ``(loss, params, batches)``.
        device: Device to move everything to; None to move nothing.
        dtype: Dtype of parameters and floating-point inputs; None to convert nothing.
        count: Maximum number of examples; None for all.
        batch_size: Maximum number of examples per batch; larger batches are split.
        mesh: Mesh of ranks that divide the parameters of a model; None to divide none.
        shard: Globs over the blocks of a divided model, as in `functional`.

    Raises:
        TargetError: If ``returned`` is neither of these tuples, or cannot be analysed.
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
            f"{target} returned batches that can be iterated over only once "
            f"({type(batches).__name__}): return a list or a DataLoader"
        )
    try:
        if isinstance(head, nn.Module):
            if not callable(middle):
                raise TypeError(f"its criterion, of type {type(middle).__name__}, is not callable")
            if getattr(middle, "reduction", "mean") == "sum":
                raise ValueError(
                    "its criterion has reduction='sum', but batches are averaged: use "
                    "reduction='mean'"
                )
            if isinstance(middle, nn.Module):
                middle.to(device=device, dtype=dtype)
            model_fn, params = functional(
                head.to(device=device, dtype=dtype), mesh=mesh, shard=shard
            )
            loss: LossFunction = supervised(model_fn, middle)
        elif mesh is not None:
            raise ValueError("only the parameters of a model can be divided among processes")
        else:
            loss = head
            params = tree_map(lambda leaf: _placed(leaf, device, dtype), middle)
            space_of(params)
    except (TypeError, ValueError) as error:
        raise TargetError(f"{target} must return {expected}: {error}") from error
    moved = Batches(batches, device, dtype, batch_size)
    return Problem(loss, params, moved if count is None else first(moved, count))
