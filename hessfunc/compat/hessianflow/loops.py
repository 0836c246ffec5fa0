"""What scripts with a training loop of their own import."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn, optim
from torch.nn import functional as F

from hessfunc.compat.place import bare
from hessfunc.options import validated
from hessfunc.training.evaluation import evaluated
from hessfunc.training.steps import Batch

__all__ = ["exp_lr_scheduler", "progress_bar", "test"]


@validated
def exp_lr_scheduler(optimizer: optim.Optimizer, decay_ratio: float = 0.1) -> optim.Optimizer:
    """Multiply the learning rates by ``decay_ratio``; returns the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] *= decay_ratio
    return optimizer


@validated
def test(model: nn.Module, test_loader: Iterable[Batch]) -> float:
    """The accuracy in eval mode, in percent, which is printed, too."""
    accuracy = 100 * evaluated(bare(model), test_loader, F.cross_entropy).accuracy
    print(f"test accuracy {accuracy:.3f} %")
    return accuracy


def progress_bar(current: int, total: int, msg: str | None = None) -> None:
    """Print how far an epoch is; ``current`` is counted from 0, and the line is written over."""
    end = "\n" if current + 1 == total else "\r"
    print(f"{current + 1}/{total} {msg or ''}", end=end, flush=True)
