"""The conv net 3c3d of DeepOBS for CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hessfunc.problems.xavier import xavier

__all__ = ["c3d3"]


def c3d3(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A conv net of 895,210 parameters: ``[N, 3, 32, 32]`` -> ``[N, 10]``.

    Three convolutions, each with a max-pooling of 3 x 3 with stride 2, and three dense layers;
    Xavier weights and no biases to start with.

    Source: Schneider, Balles and Hennig 2019, DeepOBS, arXiv 1903.05499.
    """
    return xavier(
        nn.Sequential(
            *(nn.Conv2d(3, 64, 5), activation(), *_pooled()),
            *(nn.Conv2d(64, 96, 3), activation(), *_pooled()),
            *(nn.Conv2d(96, 128, 3, padding=1), activation(), *_pooled()),
            nn.Flatten(),
            *(nn.Linear(1152, 512), activation()),
            *(nn.Linear(512, 256), activation()),
            nn.Linear(256, 10),
        )
    )


def _pooled() -> tuple[nn.Module, nn.Module]:
    # TensorFlow's padding "same" of an even size; zeros stand for nothing, as no input is negative.
    return nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)
