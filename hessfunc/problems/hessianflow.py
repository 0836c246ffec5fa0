"""The small conv nets C1 and C2, on which batch sizes were studied by their Hessians."""

from __future__ import annotations

from torch import nn

__all__ = ["c1", "c2"]


def c1(channels: int = 3, size: int = 32) -> nn.Sequential:
    """Two 5 x 5 convolutions and three dense layers: ``[N, channels, size, size]`` -> ``[N, 10]``.

    1,756,682 parameters for CIFAR-10. Each pooling, of 3 x 3 with stride 2, halves the image.

    Source: Yao, Gholami, Lei, Keutzer and Mahoney 2018, arXiv 1802.08241.
    """
    # (size + 1) // 2, twice.
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
    """Four 3 x 3 convolutions and three dense layers: ``[N, channels, size, size]`` -> ``[N, 10]``.

    1,148,746 parameters for CIFAR-10. Without padding: images are 16 x 16 at least.

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
