"""The multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

__all__ = ["mlp"]


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A perceptron of the given widths, input and output included: ``mlp([64, 32, 10])``.

    Inputs have any shape ``[N, ...]`` with ``widths[0]`` numbers an example; outputs are
    ``[N, widths[-1]]``.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])
