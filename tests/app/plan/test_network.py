"""Sizes of a transformer, and of its graph."""

from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.app.plan import Transformer
from hessfunc.app.problems.gpt import GPT, next_token_loss
from hessfunc.memory import Footprint


@pytest.mark.parametrize(
    ("params", "layers", "width"),
    [(85_054_464, 12, 768), (6_442_450_944, 32, 4096), (68_700_000_000, 80, 8192)],
)
def test_the_usual_shape_is_near_that_of_known_models(params: int, layers: int, width: int) -> None:
    shape = Transformer.usual(params)
    assert 12 * shape.layers * shape.width**2 == pytest.approx(params, rel=0.01)
    assert shape.layers * shape.width == pytest.approx(layers * width, rel=0.25)


def test_the_largest_leaf_is_an_embedding_or_a_feed_forward_matrix_of_the_model() -> None:
    shape = {"params": 10**9, "layers": 10, "width": 1000, "heads": 8}
    assert Transformer(**shape, vocabulary=50_000).largest == 50_000 * 1000
    assert Transformer(**shape, vocabulary=100).largest == 4000 * 1000
    assert Transformer.usual(1000).largest == 1000


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, "layers.*"])
def test_the_graph_of_a_transformer_is_as_large_as_is_said(recompute: str | None) -> None:
    """Of a net of other sizes than those that the constants were fitted to."""
    vocabulary, context, width, layers, heads = 800, 96, 256, 5, 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(vocabulary, context, width, layers, heads, tied=False)
    model_fn, params = hf.functional(model, recompute=recompute)
    loss = hf.composed(model_fn, next_token_loss)
    tokens = torch.randint(vocabulary, (4, context), generator=torch.Generator().manual_seed(1))
    vector = hf.random_like(params, 1, seed=0)
    with Footprint() as found:
        hf.hvp(loss)(params, tokens)(vector)
    sizes = [leaf.numel() for leaf in params.values()]
    n, largest = sum(sizes), max(sizes)
    shape = Transformer(n, layers, width, heads, vocabulary)
    numbers = shape.numbers(4 * context, context, recompute=recompute is not None)
    assert numbers == pytest.approx(found.peak / 4 - 2 * n - 2 * largest, rel=0.15)


def test_a_fused_head_takes_chunks_instead_of_logits() -> None:
    tokens, vocabulary, width = 512, 16_384, 8
    params = {"states": torch.randn(64, width) / 10, "head": torch.randn(vocabulary, width) / 10}
    ids = torch.arange(tokens) % 64

    def states(params: dict[str, torch.Tensor], _: object) -> tuple[torch.Tensor, ...]:
        return torch.tanh(params["states"][ids]), params["head"], None

    loss = hf.linear_head_loss(states, lambda _: ids)
    with Footprint() as found:
        hf.hvp(loss)(params, None)(hf.random_like(params, 1, seed=0))
    n = sum(leaf.numel() for leaf in params.values())
    shape = Transformer(n, 1, width, 1, vocabulary)
    network = shape.network("float32", tokens=tokens, context=tokens).without_logits()
    assert network.activations == pytest.approx(found.peak - 4 * 4 * n, rel=0.25)
    # Chunks have one size, and a head with fewer logits gains nothing.
    few = shape.network("float32", tokens=8, context=8)
    assert few.without_logits() is few


def test_frozen_parameters_are_no_entries_of_vectors() -> None:
    network = Transformer.usual(10**6).network("float32", tokens=8, context=8)
    part = network.with_trainable(10**4)
    assert (part.params, part.frozen, part.weights) == (10**4, 99 * 10**4, network.weights)
    with pytest.raises(ValueError, match="trainable=0: choose 1 to 1000000"):
        network.with_trainable(0)
