"""The data sets and nets that the commands train, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hessfunc.problems import data
from hessfunc.problems.c3d3 import c3d3
from hessfunc.problems.c4d3 import c4d3
from hessfunc.problems.chen import chen_mlp
from hessfunc.problems.convnet import digits_convnet
from hessfunc.problems.data import Examples
from hessfunc.problems.mlp import mlp

__all__ = ["NETS", "examples", "net"]

# Of each data set.
NETS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "digits": {
        "mlp": lambda: mlp([64, 32, 10], nn.Sigmoid),
        "convnet": digits_convnet,
    },
    "cifar10": {
        "mlp": lambda: mlp([3072, 512, 64, 10], nn.Sigmoid),
        "chen": chen_mlp,
        "c4d3": lambda: c4d3(nn.Sigmoid),
        "c3d3": lambda: c3d3(nn.Sigmoid),
    },
}

# The last 297 digits are held out; other people wrote them.
_DIGITS_TRAINED_ON = 1500


def net(dataset: str, name: str, /) -> Callable[[], nn.Module]:
    """What builds a net for a data set, with new weights from torch's stream.

    Raises:
        ValueError: there is no net of that name for these images.
    """
    if name not in NETS[dataset]:
        raise ValueError(f"there is no {name!r} for {dataset}: choose {', '.join(NETS[dataset])}")
    return NETS[dataset][name]


def examples(
    dataset: str,
    /,
    *,
    path: Path | None = None,
    count: int | None = None,
    device: torch.device | None = None,
) -> tuple[Examples, Examples]:
    """The examples to train on, and those to test on.

    Args:
        dataset: ``"digits"`` or ``"cifar10"``.
        path: of CIFAR-10, as `hessfunc.problems.data.cifar10` takes it.
        count: how many to take of each, at most.
        device: where to; by default the CPU.

    Raises:
        FileNotFoundError: CIFAR-10 is not there.
    """
    if dataset == "digits":
        found = data.digits()
        seen, held_out = found[:_DIGITS_TRAINED_ON], found[_DIGITS_TRAINED_ON:]
    else:
        seen, held_out = data.cifar10(path, "train"), data.cifar10(path, "test")
    return _moved(seen[:count], device), _moved(held_out[:count], device)


def _moved(found: Examples, device: torch.device | None) -> Examples:
    return Examples(found.inputs.to(device), found.targets.to(device))
