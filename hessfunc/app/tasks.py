"""Data sets and networks that the commands train, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hessfunc.app.problems import data
from hessfunc.app.problems.nets import c1, c2, c3d3, c4d3, chen_mlp, digits_convnet, mlp
from hessfunc.app.problems.resnet import blocks_of_depth, resnet, with_weights
from hessfunc.training.examples import Examples


@dataclass(frozen=True)
class _Images:
    """Image format of a data set, and its networks.

    Attributes:
        channels: Number of channels of an image.
        size: Height and width of an image, in pixels.
        own: Networks that are specific to this data set, by name.
    """

    channels: int
    size: int
    own: Mapping[str, Callable[[], nn.Module]]

    def nets(self) -> dict[str, Callable[[], nn.Module]]:
        """Return the networks by name, without the ResNets, whose depth is arbitrary."""
        common = {"c1": lambda: c1(self.channels, self.size)}
        if self.size >= _LEAST_SIZE_OF_C2:
            common["c2"] = lambda: c2(self.channels, self.size)
        return {**self.own, **common}


_LEAST_SIZE_OF_C2 = 16

_DATA: dict[str, _Images] = {
    "digits": _Images(
        1,
        8,
        {"mlp": lambda: mlp([64, 32, 10], nn.Sigmoid), "convnet": digits_convnet},
    ),
    "mnist": _Images(1, 28, {"mlp": lambda: mlp([784, 256, 64, 10], nn.Sigmoid)}),
    "cifar10": _Images(
        3,
        32,
        {
            "mlp": lambda: mlp([3072, 512, 64, 10], nn.Sigmoid),
            "chen": chen_mlp,
            "c4d3": lambda: c4d3(nn.Sigmoid),
            "c3d3": lambda: c3d3(nn.Sigmoid),
        },
    ),
}


def net(dataset: str, name: str, /) -> Callable[[], nn.Module]:
    """Return a function that builds a network with new weights from torch's random stream.

    Names such as ``resnet20`` select the CIFAR ResNet of that depth.

    Raises:
        ValueError: If no network of that name exists for these images.
    """
    images = _DATA[dataset]
    if depth := re.fullmatch(r"resnet(\d+)", name):
        layers, channels = int(depth[1]), images.channels
        blocks_of_depth(layers)
        return lambda: resnet(layers, channels=channels)
    nets = images.nets()
    if name not in nets:
        known = ", ".join(nets)
        raise ValueError(
            f"--arch must be one of {known}, resnet20 or another ResNet with --data {dataset}, "
            f"not {name!r}"
        )
    return nets[name]


def saved(dataset: str, name: str, path: Path, /) -> nn.Module:
    """Return a network with the weights of a checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a checkpoint, or belongs to another network.
    """
    model = net(dataset, name)()
    expected = "checkpoint.pt of hessfunc train, or any file of torch.save with a state dict"
    network, remedy = f"{name} for {dataset}", "pass --arch and --data of its training"
    return with_weights(model, path, network, remedy, expected)


def examples(
    dataset: str,
    /,
    *,
    path: Path | None = None,
    count: int | None = None,
    device: torch.device | None = None,
) -> tuple[Examples, Examples]:
    """Return the training examples and the test examples of a data set.

    Args:
        dataset: Name of the data set: digits, mnist or cifar10.
        path: Path to MNIST or CIFAR-10, as in `hessfunc.app.problems.data`.
        count: Maximum number of training examples and of test examples; None for all.
        device: Device of the tensors; None for the CPU.

    Raises:
        FileNotFoundError: If the data set does not exist at the path.
    """
    if dataset == "digits":
        seen, held_out = data.digits_apart()
    else:
        read = data.mnist if dataset == "mnist" else data.cifar10
        seen, held_out = read(path, "train"), read(path, "test")
    return _moved(seen[:count], device), _moved(held_out[:count], device)


def _moved(examples: Examples, device: torch.device | None) -> Examples:
    return Examples(examples.inputs.to(device), examples.targets.to(device))
