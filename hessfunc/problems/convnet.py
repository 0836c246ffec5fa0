"""A small conv net for 8 x 8 images."""

from __future__ import annotations

from torch import nn

__all__ = ["digits_convnet"]


def digits_convnet() -> nn.Sequential:
    """Two convolutions and a linear head, 9930 parameters: ``[N, 1, 8, 8]`` -> ``[N, 10]``.

    GELU is smooth, so the Hessian exists everywhere and finite differences agree with it.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
