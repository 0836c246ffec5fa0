"""Four convolutions and three dense layers for CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["c4d3"]


def c4d3(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A conv net of 1,099,226 parameters: ``[N, 3, 32, 32]`` -> ``[N, 10]``.

    Source: Dangel, Harmeling and Hennig 2019, arXiv 1902.01813.
    """
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), activation()),
        *(nn.Conv2d(16, 16, 3, padding=1), activation()),
        nn.MaxPool2d(2, 2),
        *(nn.Conv2d(16, 32, 3, padding=1), activation()),
        *(nn.Conv2d(32, 32, 3, padding=1), activation()),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        *(nn.Linear(2048, 512), activation()),
        *(nn.Linear(512, 64), activation()),
        nn.Linear(64, 10),
    )
