"""Train and eval mode of modules, and the batch statistics that BatchNorm uses in train mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import nn

# Whether the evaluation in this thread is one of several batches.
_SEVERAL_BATCHES: ContextVar[bool] = ContextVar("several batches", default=False)


@contextmanager
def training_flags(training: Sequence[tuple[nn.Module, bool]], /) -> Iterator[None]:
    """Context manager that sets the training flag of each module, and restores it on exit."""
    changed = [module for module, flag in training if module.training != flag]
    for module in changed:
        module.training = not module.training
    try:
        yield
    finally:
        for module in changed:
            module.training = not module.training


def eval_mode(model: nn.Module, /) -> AbstractContextManager[None]:
    """Context manager that puts a model in eval mode and restores each training flag on exit."""
    return training_flags([(module, False) for module in model.modules()])


def uses_batch_statistics(module: nn.Module, /) -> bool:
    """Return whether a module normalises by the statistics of the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


def with_batch_statistics(model: nn.Module, /) -> list[str]:
    """Return the names of the modules that normalise by the statistics of the batch."""
    return [name for name, module in model.named_modules() if uses_batch_statistics(module)]


@contextmanager
def several_batches() -> Iterator[None]:
    """Context manager of a sum over several batches, in which batch statistics are refused."""
    token = _SEVERAL_BATCHES.set(True)
    try:
        yield
    finally:
        _SEVERAL_BATCHES.reset(token)


def refuse_batch_statistics(names: Sequence[str], /) -> None:
    """Raise inside of `several_batches` if there is a module that uses batch statistics."""
    if names and _SEVERAL_BATCHES.get():
        raise ValueError(
            f"BatchNorm {names[0]!r} uses the statistics of each batch, so the result would "
            "depend on how the data is divided into batches: call `model.eval()` before "
            "`functional(model)`, or use one batch"
        )
