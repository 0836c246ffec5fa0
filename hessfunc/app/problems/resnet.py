"""ResNets for CIFAR-10 (He, Zhang, Ren, Sun 2015, arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_SOURCE = (
    "pretrained_models/resnet20-12fca82f.th of https://github.com/akamaster/pytorch_resnet_cifar10"
)
_EXPECTED = f"a file like {WEIGHTS_SOURCE}"


class Block(nn.Module):
    """Residual block of two 3 x 3 convolutions.

    If the shape changes, the shortcut is option A of the paper: it takes every second pixel, fills
    new channels with zeros, and has no parameters.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with stages of 16, 32 and 64 channels: ``[N, C, H, W]`` -> ``[N, classes]``."""

    def __init__(self, blocks: int, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


def resnet(depth: int = 20, classes: int = 10, channels: int = 3) -> ResNet:
    """Return the ResNet with ``depth`` = 6n + 2 layers (20, 32, 44, 56, 110), for any image size.

    Raises:
        ValueError: If depth is not 6n + 2 with n >= 1.
    """
    return ResNet(blocks_of_depth(depth), classes, channels)


def blocks_of_depth(depth: int) -> int:
    """Return the number of blocks per stage of a ResNet.

    Raises:
        ValueError: If depth is not 6n + 2 with n >= 1.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"the depth of a CIFAR ResNet must be 6n + 2 with n >= 1, not {depth}")
    return blocks


def load_weights(path: str | Path, expected: str = _EXPECTED) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint on the CPU, without the prefix of ``DataParallel``.

    Args:
        path: Path to a file of ``torch.save``: a state dict, or a dict with one under
            ``state_dict``.
        expected: Description of the expected file, for the error message.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a checkpoint of that form.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: expected {expected}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint.get("state_dict", checkpoint)
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint with a state dict") from error


def with_weights(
    model: nn.Module, path: Path, network: str, remedy: str, expected: str = _EXPECTED
) -> nn.Module:
    """Return a model with the weights of a checkpoint.

    Args:
        model: Network to which the weights belong.
        path: Path to the checkpoint, as in `load_weights`.
        network: Name of the network, for the error message.
        remedy: Advice for a checkpoint of another network.
        expected: Description of the expected file, as in `load_weights`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a checkpoint, or belongs to another network.
    """
    state, wanted = load_weights(path, expected), model.state_dict()
    try:
        model.load_state_dict(state)
        return model
    except RuntimeError as error:
        mismatch = error
    missing = [f"{name} is missing" for name in wanted if name not in state]
    unexpected = [f"{name} is not expected" for name in state if name not in wanted]
    others = [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    first = " and ".join(missing[:1] + unexpected[:1] or others[:1])
    raise ValueError(
        f"{path} does not contain the weights of a {network}: {first}; {remedy}"
    ) from mismatch
