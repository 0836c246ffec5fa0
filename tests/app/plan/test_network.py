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
