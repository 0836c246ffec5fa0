"""The nets, each with one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.nets import c3d3, digits_convnet, mlp
from hessfunc.randomness import seeded

Made = tuple[nn.Sequential, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """A net and one batch, with the cross-entropy."""

    model: nn.Sequential
    inputs: Tensor
    targets: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    @cached_property
    def loss(self) -> hf.Loss:
        return hf.supervised(hf.functional(self.model)[0], F.cross_entropy)

    @cached_property
    def params(self) -> dict[str, Tensor]:
        return hf.functional(self.model)[1]

    def vectors(self, k: int) -> dict[str, Tensor]:
        """A block of k vectors, the same each time."""
        with seeded(1):
            return {n: torch.randn(k, *p.shape, dtype=p.dtype) for n, p in self.params.items()}

    def has(self, kind: type[nn.Module]) -> bool:
        return any(isinstance(module, kind) for module in self.model.modules())

    @cached_property
    def positions(self) -> dict[str, int]:
        """The positions of an example that each weight acts on."""
        found, x = {}, self.inputs[:1]
        for name, module in self.model.named_children():
            x = module(x)
            if hasattr(module, "weight"):
                found[f"{name}.weight"] = x[0, 0].numel()
        return found


def problem(name: str, dtype: torch.dtype, examples: int | None = None) -> Problem:
    """One of the nets, with its own number of examples or another."""
    _, usual, make = PROBLEMS[name]
    with seeded(0):
        model, inputs, targets = make(examples or usual)
    return Problem(model.to(dtype), inputs.to(dtype), targets)


def _mlp(examples: int) -> Made:
    net = mlp([784, 128, 64, 10], nn.Sigmoid)
    return net, torch.randn(examples, 784), torch.randint(10, (examples,))


def _digits(activation: type[nn.Module], examples: int) -> Made:
    layers = (activation() if isinstance(m, nn.GELU) else m for m in digits_convnet())
    data = digits()[:examples]
    return nn.Sequential(*layers), data.inputs, data.targets


def _c3d3(examples: int) -> Made:
    return c3d3(), torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,))


# By name: the title, the examples of a batch, and how the net and its data are made.
PROBLEMS: dict[str, tuple[str, int, Callable[[int], Made]]] = {
    "mlp": ("MLP 784-128-64-10, sigmoid", 128, _mlp),
    "digits-gelu": ("digits convnet, GELU", 128, lambda n: _digits(nn.GELU, n)),
    "digits-sigmoid": ("digits convnet, sigmoid", 128, lambda n: _digits(nn.Sigmoid, n)),
    "3c3d": ("3c3d, ReLU, random CIFAR-10 shapes", 32, _c3d3),
}
