"""Small models of every kind with a batch and a loss, whole or divided among ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.gpt import GPT
from hessfunc.app.problems.resnet import ResNet
from hessfunc.app.problems.vit import ViT
from tests.distributed import modules, problems

VOCABULARY = 9


class LlamaLayer(nn.Module):
    """RMSNorm, rotary positions, two query heads for one key head, and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(8), nn.RMSNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, n, bias=False) for n in (8, 4, 4))
        self.out, self.gate, self.up, self.down = (
            nn.Linear(*n, bias=False) for n in ((8, 8), (8, 6), (8, 6), (6, 8))
        )

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            m(y).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        q, k = (rotated(a, angles) for a in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Llama(nn.Module):
    """Its head is tied to its embedding, and angles are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(2))
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("angles", torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.angles)
        return self.head(self.norm(x))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return make().double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: made(lambda: GPT(VOCABULARY, context=6, width=8, layers=2, heads=2)),
    "llama": lambda: made(Llama),
    "vit": lambda: made(
        lambda: ViT(size=4, patch=2, channels=1, classes=3, width=6, layers=2, heads=2)
    ),
    "resnet": lambda: made(lambda: ResNet(1, classes=3, channels=1)),
}
# Each rank has other rows; the number of examples is odd.
EXAMPLES = 5


@cache
def batch(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name in ("gpt", "llama"):
        tokens = torch.randint(VOCABULARY, (EXAMPLES, 6), generator=generator)
        return tokens, tokens.roll(-1, 1)
    size = 4 if name == "vit" else 8
    images = torch.randn(EXAMPLES, 1, size, size, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (EXAMPLES,), generator=generator)


def loss_of(model_fn: Any, name: str) -> hf.Loss:
    if name in ("vit", "resnet"):
        return hf.supervised(model_fn, F.cross_entropy)

    def outputs(params: Any, pair: tuple[Tensor, Tensor]) -> Tensor:
        return model_fn(params, tokens=pair[0]).flatten(0, 1)

    return hf.composed(outputs, F.cross_entropy, targets=lambda pair: pair[1].flatten())


INPUTS, LABELS = (x[:5] for x in modules.batch("mlp"))
mlp = partial(modules.model, "mlp")


def calls(model: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Evaluate a divided model."""
    model_fn, params = hf.functional(model.double(), mesh=problems.mesh(2), **options)
    model_fn(params, *inputs or (INPUTS,))
