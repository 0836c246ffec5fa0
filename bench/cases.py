"""The nets on which products are timed: random weights, random inputs, float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.app.problems.gpt import GPT, next_token_loss
from hessfunc.app.problems.nets import mlp
from hessfunc.app.problems.resnet import resnet
from hessfunc.randomness import seeded


@dataclass(frozen=True)
class Case:
    """A model, its criterion and one batch.

    Attributes:
        title: for the table.
        smooth: no kinks, so that a difference of gradients is near the derivative.
        attention: attention is in it, whose fused kernels have no second derivative.
    """

    title: str
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    smooth: bool = False
    attention: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The leaves, in the order of ``named_parameters``."""
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        """The loss, as a training loop writes it."""
        return self.criterion(self.model(self.inputs), self.targets)


def _small_mlp() -> Case:
    inputs, targets = torch.randn(64, 64), torch.randint(10, (64,))
    return Case("MLP 64-32-10, batch 64", mlp([64, 32, 10]), F.cross_entropy, inputs, targets)


def _wide_mlp() -> Case:
    inputs, targets = torch.randn(256, 784), torch.randint(10, (256,))
    model = mlp([784, 256, 256, 10])
    return Case("MLP 784-256-256-10, batch 256", model, F.cross_entropy, inputs, targets)


def _gpt() -> Case:
    inputs, targets = torch.randint(512, (8, 64)), torch.randint(512, (8, 64))
    title = "GPT 4 x 128, T = 64, batch 8"
    return Case(title, GPT(), next_token_loss, inputs, targets, smooth=True, attention=True)


def _resnet20() -> Case:
    inputs, targets = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    model = resnet(20).eval()
    return Case("ResNet-20 in eval mode, batch 64", model, F.cross_entropy, inputs, targets)


def _reproducible(make: Callable[[], Case]) -> Callable[[], Case]:
    def made() -> Case:
        with seeded(0):
            return make()

    return made


CASES: dict[str, Callable[[], Case]] = {
    "mlp-small": _reproducible(_small_mlp),
    "mlp-wide": _reproducible(_wide_mlp),
    "gpt": _reproducible(_gpt),
    "resnet20": _reproducible(_resnet20),
}
