"""Kronecker factors of whole models: a block for each parameter, and exact traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf

TOKENS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, intermediate_size=12, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SIZES, intermediate_size=12, max_position_embeddings=6)
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_language_models(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
    model_fn, params = hf.functional(model)

    def logits(params: dict[str, Tensor], batch: Any) -> Tensor:
        return model_fn(params, {"input_ids": batch}).logits.movedim(-1, 1)

    loss = hf.composed(logits, F.cross_entropy, targets=lambda batch: batch.flip(1))
    # Llama normalises in float32, whatever the dtype of its parameters.
    rtol = 1e-6 if make is llama else 1e-8
    assert_traces(loss, model, params, TOKENS, rtol)


def assert_traces(
    loss: hf.Loss,
    model: nn.Module,
    params: dict[str, Tensor],
    batch: Any,
    rtol: float = 1e-8,
) -> None:
    blocks = hf.kronecker.ekfac(loss, model, unsupported="diagonal")(params, batch)
    assert list(blocks) == list(params)
    assert blocks.diagonals == ()
    exact = hf.ggn_diagonal(loss, params, [batch], examples_per_chunk=1)
    for name, block in blocks.items():
        assert block.trace() == pytest.approx(float(exact[name].sum()), rel=rtol, abs=1e-14)


class Residual(nn.Module):
    """Residual network with BatchNorm and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.one, self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.up, self.head = nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.relu(x + self.first(self.one(x)))
        return self.head(torch.tanh(self.up(x)).mean((2, 3)))


def test_a_residual_network() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual().double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
        batch = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.arange(3)
    model_fn, params = hf.functional(model)
    assert_traces(hf.supervised(model_fn, F.cross_entropy), model, params, batch)


class Adapted(nn.Module):
    """Linear layer with a low-rank adapter (LoRA), whose own weight is frozen."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(inner.in_features, 2, bias=False),
            nn.Linear(2, 4, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * self.up(self.down(x))


def test_low_rank_adapters() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(Adapted(nn.Linear(3, 4)), nn.Tanh(), Adapted(nn.Linear(4, 4)))
        model = model.double()
        batch = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 4
    model_fn, params = hf.functional(model)
    assert len(params) == 4
    assert_traces(hf.supervised(model_fn, F.cross_entropy), model, params, batch)
