"""The data sets and nets that the commands train, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hessfunc.app.problems import data
from hessfunc.app.problems.nets import c1, c2, c3d3, c4d3, chen_mlp, digits_convnet, mlp
from hessfunc.app.problems.resnet import blocks_of_depth, load_weights, resnet
from hessfunc.training.examples import Examples


@dataclass(frozen=True)
class _Images:
    """What nets for a data set look like.

    Attributes:
        channels: of an image.
        size: its height and width.
        own: nets that are made for it alone.
    """

    channels: int
    size: int
    own: Mapping[str, Callable[[], nn.Module]]

    def nets(self) -> dict[str, Callable[[], nn.Module]]:
        """By their names; all but the ResNets, of which there are many."""
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
DATASETS = tuple(_DATA)

# The last 297 digits are held out; other people wrote them.
_DIGITS_TRAINED_ON = 1500


def net(dataset: str, name: str, /) -> Callable[[], nn.Module]:
    """What builds a net for a data set, with new weights from torch's stream.

    ``resnet20`` and the like are the CIFAR ResNets of that depth.

    Raises:
        ValueError: there is no net of that name for these images.
    """
    images = _DATA[dataset]
    if depth := re.fullmatch(r"resnet(\d+)", name):
        layers, channels = int(depth[1]), images.channels
        blocks_of_depth(layers)
        return lambda: resnet(layers, channels=channels)
    nets = images.nets()
    if name not in nets:
        raise ValueError(f"there is no {name!r} for {dataset}: choose {', '.join(nets)}, resnet20")
    return nets[name]


def saved(dataset: str, name: str, path: Path, /) -> nn.Module:
    """A net with the weights of a checkpoint.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is no checkpoint, or one of another net.
    """
    make_model = net(dataset, name)
    state = load_weights(
        path, "checkpoint.pt of hessfunc train, or any file of torch.save with a state dict"
    )
    model = make_model()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        difference = _difference(state, model.state_dict())
        raise ValueError(
            f"{path} does not hold the weights of a {name} for {dataset}, as {difference}: are "
            "--arch and --data those of its training?"
        ) from error
    return model


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The first things in which two state dicts differ."""
    missing = [f"{name} is missing" for name in wanted if name not in found]
    unexpected = [f"{name} is not expected" for name in found if name not in wanted]
    others = [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return " and ".join(missing[:1] + unexpected[:1] or others[:1])


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
        dataset: one of `DATASETS`.
        path: of MNIST or CIFAR-10, as `hessfunc.app.problems.data` takes it.
        count: how many to take of each, at most.
        device: where to; by default the CPU.

    Raises:
        FileNotFoundError: the data set is not there.
    """
    if dataset == "digits":
        found = data.digits()
        seen, held_out = found[:_DIGITS_TRAINED_ON], found[_DIGITS_TRAINED_ON:]
    else:
        read = data.mnist if dataset == "mnist" else data.cifar10
        seen, held_out = read(path, "train"), read(path, "test")
    return _moved(seen[:count], device), _moved(held_out[:count], device)


def _moved(found: Examples, device: torch.device | None) -> Examples:
    return Examples(found.inputs.to(device), found.targets.to(device))
