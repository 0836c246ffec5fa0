"""Small models with a batch each, in float64: every kind of layer and input that must work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.losses import LossFunction
from tests.reference import hessian


@dataclass(frozen=True)
class Case:
    """A module, its loss as a pure function, and one batch."""

    model: nn.Module
    loss: hf.Loss
    params: dict[str, Tensor]
    batch: Any


class Attention(nn.Module):
    """Causal self-attention by ``scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself."""

    def __init__(self, width: int, heads: int, *, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Recurrent(nn.Module):
    """The last output of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


class TiedHead(nn.Module):
    """Next-token logits; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(tokens))))


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class PartlyUnused(nn.Module):
    """One layer is never called, and one enters the output only linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 4)
        self.unused = nn.Linear(3, 2)
        self.offset = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.used(x)), self.offset.sum()


class CalledTwice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class TwoInputs(nn.Module):
    """A module of two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.left(left)) * self.right(right)


def randn(*shape: int) -> Tensor:
    """Normal entries in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def waves(*shape: int) -> Tensor:
    """Fixed entries in float64, between -1 and 1."""
    return torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64).cos().view(shape)


def mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error, written as a mean: ``F.mse_loss`` has no forward mode."""
    return (outputs - targets).square().mean()


def _case(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> Case:
    model_fn, params = hf.functional(model)
    return Case(model, hf.supervised(model_fn, criterion), params, (inputs, targets))


def _classes(count: int, of: int) -> Tensor:
    return torch.randint(of, (count,))


def _mlp() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return _case(model, F.cross_entropy, torch.randn(6, 3), _classes(6, 3))


def _conv() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Conv2d(3, 3, 3, groups=3),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )
    return _case(model, F.cross_entropy, torch.randn(5, 2, 6, 6), _classes(5, 3))


def _normalised(norm: nn.Module, *, training: bool = True) -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).train(training)
    return _case(model, F.cross_entropy, torch.randn(5, 1, 4, 4), _classes(5, 3))


def _batch_norm(*, training: bool) -> Case:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    return _normalised(norm, training=training)


def _sequence(model: nn.Module) -> Case:
    return _case(model, mean_square, torch.randn(3, 5, 4), torch.randn(3, 5, 4))


def _encoder(*, dropout: float) -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout, activation="gelu", batch_first=True)
    return _sequence(layer.train(dropout > 0))


def _lstm() -> Case:
    return _case(Recurrent(), F.cross_entropy, torch.randn(4, 5, 3), _classes(4, 4))


def _tied_head() -> Case:
    def criterion(logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    tokens = torch.randint(7, (3, 6))
    return _case(TiedHead(), criterion, tokens[:, :-1], tokens[:, 1:])


def _residual() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        Residual(nn.Sequential(nn.GroupNorm(1, 3), nn.SiLU(), nn.Conv2d(3, 3, 3, padding=1))),
        Residual(nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 1))),
        nn.Flatten(),
        nn.Linear(48, 2),
    ).eval()
    return _case(model, F.cross_entropy, torch.randn(4, 1, 4, 4), _classes(4, 2))


def _dropout() -> Case:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    return _case(model, F.cross_entropy, torch.randn(6, 3), _classes(6, 3))


def _frozen() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return _case(model, F.cross_entropy, torch.randn(6, 3), _classes(6, 3))


def _unused() -> Case:
    def criterion(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        curved, linear = outputs
        return F.cross_entropy(curved, targets) + linear

    return _case(PartlyUnused(), criterion, torch.randn(6, 3), _classes(6, 4))


def _tuple_inputs() -> Case:
    inputs = torch.randn(5, 3), torch.randn(5, 2)
    return _case(TwoInputs(), mean_square, inputs, torch.randn(5, 4))


def _mapping_inputs() -> Case:
    inputs = {"right": torch.randn(5, 2), "left": torch.randn(5, 3)}
    return _case(TwoInputs(), mean_square, inputs, torch.randn(5, 4))


def _squared_error() -> Case:
    return _case(nn.Linear(3, 2), F.mse_loss, torch.randn(5, 3), torch.randn(5, 2))


def _gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    def criterion(outputs: Any, tokens: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    config = GPT2Config(vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2)
    tokens = torch.randint(7, (2, 6))
    return _case(GPT2LMHeadModel(config).eval(), criterion, {"input_ids": tokens}, tokens)


def _bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=6,
    )
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5], [2, 6, 1, 3, 0], [4, 4, 2, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    }
    return _case(
        BertForSequenceClassification(config).train(),
        lambda outputs, targets: F.cross_entropy(outputs.logits, targets),
        inputs,
        _classes(3, 2),
    )


_CASES: Mapping[str, Callable[[], Case]] = {
    "mlp": _mlp,
    "conv": _conv,
    "layer norm": lambda: _normalised(nn.LayerNorm([4, 2, 2])),
    "group norm": lambda: _normalised(nn.GroupNorm(2, 4)),
    "batch norm, train": lambda: _batch_norm(training=True),
    "batch norm, eval": lambda: _batch_norm(training=False),
    "scaled dot product attention": lambda: _sequence(Attention(4, 2)),
    "multi-head attention": lambda: _sequence(SelfAttention(4, 2, need_weights=True)),
    "multi-head attention, fused": lambda: _sequence(SelfAttention(4, 2, need_weights=False)),
    "transformer encoder layer": lambda: _encoder(dropout=0.0),
    "transformer encoder layer, dropout": lambda: _encoder(dropout=0.3),
    "lstm": _lstm,
    "tied head": _tied_head,
    "residual": _residual,
    "dropout": _dropout,
    "frozen": _frozen,
    "unused": _unused,
    "tuple inputs": _tuple_inputs,
    "mapping inputs": _mapping_inputs,
    "mse loss": _squared_error,
    "gpt2": _gpt2,
    "bert, dropout": _bert,
}
NAMES = tuple(_CASES)
NO_FORWARD_MODE = ("mse loss",)
# Torch lays the activations out in another order there, and fills the same mask in that order.
OTHER_MASK_IN_FORWARD_MODE = ("transformer encoder layer, dropout",)


def case(name: str) -> Case:
    """A fresh model and batch, the same each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _CASES[name]()
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class ClosedForm:
    """A loss whose Hessian is known, of batches ``(X, targets)`` of 15 examples."""

    loss: LossFunction
    params: dict[str, Tensor]
    batch: tuple[Tensor, Tensor]
    hessian: Tensor


def _linear_regression(X: Tensor) -> ClosedForm:
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return mean_square(batch[0] @ params["w"], batch[1])

    w, y = torch.linspace(-1, 1, X.shape[1]).to(X), X.sum(1).cos()
    return ClosedForm(loss, {"w": w}, (X, y), 2 / len(X) * X.mT @ X)


def _logistic_regression(X: Tensor) -> ClosedForm:
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(batch[0] @ params["w"], batch[1])

    w, y = torch.linspace(-1, 1, X.shape[1]).to(X), (X.sum(1) > 0).to(X)
    s = torch.sigmoid(X @ w)
    return ClosedForm(loss, {"w": w}, (X, y), X.mT @ torch.diag(s * (1 - s)) @ X / len(X))


def _softmax_regression(X: Tensor) -> ClosedForm:
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(batch[0] @ params["W"].mT, batch[1])

    W = torch.linspace(-1, 1, 3 * X.shape[1]).to(X).reshape(3, -1)
    p = torch.softmax(X @ W.mT, dim=1)
    outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    kron = torch.einsum("nab,ni,nj->aibj", outer, X, X).reshape(W.numel(), W.numel())
    return ClosedForm(loss, {"W": W}, (X, torch.arange(len(X)) % 3), kron / len(X))


_CLOSED_FORMS: Mapping[str, Callable[[Tensor], ClosedForm]] = {
    "linear regression": _linear_regression,
    "logistic regression": _logistic_regression,
    "softmax regression": _softmax_regression,
}
CLOSED_FORMS = tuple(_CLOSED_FORMS)


def closed_form(name: str) -> ClosedForm:
    """A problem with a known Hessian, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return _CLOSED_FORMS[name](torch.randn(15, 4, dtype=torch.float64, generator=generator))


@cache
def dense_hessian(name: str) -> Tensor:
    """The dense Hessian of a case."""
    found = case(name)
    return hessian(found.loss, found.params, found.batch)
