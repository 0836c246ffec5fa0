"""Multilayer perceptrons and small conv nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from torch import nn


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a perceptron with the given widths, from input to output: ``mlp([64, 32, 10])``.

    Inputs have any shape ``[N, ...]`` with ``widths[0]`` numbers per example; outputs have shape
    ``[N, widths[-1]]``.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def c3d3(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a conv net with 895,210 parameters: ``[N, 3, 32, 32]`` -> ``[N, 10]``.

    It has three convolutions, each followed by 3 x 3 max-pooling with stride 2, and three dense
    layers. Weights start from the Xavier initialisation, and biases from zero.

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
    # Equals TensorFlow's padding "same" for even sizes. Padding with zeros does not change the
    # maximum if the activation is not negative.
    return nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)


def c4d3(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a conv net with 1,099,226 parameters: ``[N, 3, 32, 32]`` -> ``[N, 10]``.

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


def chen_mlp() -> nn.Sequential:
    """Return eight linear layers with sigmoids in between, 3,846,810 parameters.

    The network maps ``[N, 3, 32, 32]`` -> ``[N, 10]``. Weights start from the Xavier
    initialisation, and biases from zero.

    Source: Chen, Chou and Chang 2018, arXiv 1802.06502, on CIFAR-10.
    """
    return xavier(mlp([3072, 1024, 512, 256, 128, 64, 32, 16, 10], nn.Sigmoid))


def digits_convnet() -> nn.Sequential:
    """Return two convolutions and a linear head: ``[N, 1, 8, 8]`` -> ``[N, 10]``.

    The network has 9930 parameters.

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


def c1(channels: int = 3, size: int = 32) -> nn.Sequential:
    """Return the conv net C1: ``[N, channels, size, size]`` -> ``[N, 10]``.

    It has two 5 x 5 convolutions and three dense layers, with 1,756,682 parameters for CIFAR-10.
    Each 3 x 3 pooling with stride 2 halves the image.

    Source: Yao, Gholami, Lei, Keutzer and Mahoney 2018, arXiv 1802.08241.
    """
    # Each pooling maps size to (size + 1) // 2.
    left = (size + 3) // 4
    return nn.Sequential(
        *(nn.Conv2d(channels, 64, 5, padding=2), nn.ReLU(), nn.BatchNorm2d(64)),
        nn.MaxPool2d(3, 2, padding=1),
        *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.BatchNorm2d(64)),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Flatten(),
        *(nn.Linear(64 * left**2, 384), nn.ReLU()),
        *(nn.Linear(384, 192), nn.ReLU()),
        nn.Linear(192, 10),
    )


def c2(channels: int = 3, size: int = 32) -> nn.Sequential:
    """Return the conv net C2: ``[N, channels, size, size]`` -> ``[N, 10]``.

    It has four 3 x 3 convolutions and three dense layers, with 1,148,746 parameters for CIFAR-10.
    The convolutions have no padding, so images must be at least 16 x 16.

    Source: Yao, Gholami, Lei, Keutzer and Mahoney 2018, arXiv 1802.08241.
    """
    left = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(channels, 64, 3), nn.ReLU(), nn.BatchNorm2d(64)),
        *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.BatchNorm2d(64)),
        nn.MaxPool2d(2),
        *(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.BatchNorm2d(128)),
        *(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.BatchNorm2d(128)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *(nn.Linear(128 * left**2, 256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, 10),
    )


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def xavier(model: AnyModule) -> AnyModule:
    """Reinitialise the weights of a model from torch's random stream, and its biases with zero.

        w ~ N(0, 2 / (fan_in + fan_out))

    Source: Glorot and Bengio 2010.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
