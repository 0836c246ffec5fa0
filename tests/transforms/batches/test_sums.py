"""Weighted sums of the products of batches, one batch after another."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc.memory import Footprint
from tests.cases import case
from tests.graphs import counted_graphs
from tests.reference import matrix, relative_error, rows


def test_sums_of_bfloat16_products_are_in_float32() -> None:
    params = {"w": torch.ones(1, dtype=torch.bfloat16)}
    of_batch = hf.hvp(lambda p, x: (x * p["w"] ** 2 / 2).sum(), chunk_size=1)
    curvature = hf.over_batches(of_batch, weight=hf.examples)
    matvec = curvature(params, [torch.tensor([1.0])] * 1000)
    assert matvec({"w": torch.ones(1, 1, dtype=torch.bfloat16)})["w"].item() == 1.0


def test_one_graph_lives_at_a_time_unless_they_are_kept() -> None:
    found = case("conv")
    v = hf.random_like(found.params, 2, seed=0)

    def most_held(batches: list[Any], *, keep: bool) -> int:
        with counted_graphs() as graphs:
            matvec = hf.over_batches(hf.hvp(found.loss), keep=keep)(found.params, batches)
            matvec(v)
            assert (len(graphs.alive) > 0) == keep
            del matvec
            assert len(graphs.alive) == 0
        return graphs.most

    one = most_held([found.batch], keep=False)
    assert most_held([found.batch] * 5, keep=False) == one > 0
    assert most_held([found.batch] * 5, keep=True) > 4 * one


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("batches", "weight"),
    [([], hf.examples), (DataLoader(TensorDataset(X[:0])), hf.examples), ([(X, Y)], lambda _: 0)],
    ids=["no batch", "empty loader", "no weight"],
)
def test_no_data_is_refused(batches: Any, weight: Any, keep: bool) -> None:
    found = case("mlp")
    curvature = hf.over_batches(hf.hvp(found.loss), weight=weight, keep=keep)
    with pytest.raises(ValueError, match="sum to zero: check that the loader is not empty"):
        curvature(found.params, batches)(hf.random_like(found.params, 1, seed=0))


def test_batches_of_weight_zero_are_left_out() -> None:
    found = case("mlp")
    nothing = tuple(
        leaf * float("nan") if leaf.is_floating_point() else leaf for leaf in found.batch
    )
    batches = [found.batch, nothing]
    weights = {id(found.batch): 3.0, id(nothing): 0.0}
    for keep in (False, True):
        curvature = hf.over_batches(hf.hvp(found.loss), weight=lambda b: weights[id(b)], keep=keep)
        product = matrix(curvature(found.params, batches), found.params)
        expected = matrix(hf.hvp(found.loss)(found.params, found.batch), found.params)
        assert relative_error(product, expected) < 1e-12


def test_more_batches_take_no_more_memory() -> None:
    of = case("mlp")
    peaks = []
    for count in (1, 4):
        matvec = hf.over_batches(hf.hvp(of.loss))(of.params, [of.batch] * count)
        block = hf.random_like(of.params, 1, seed=0)
        with Footprint() as memory:
            matvec(block)
        peaks.append(memory.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("curvature", [hf.hvp, hf.ggnvp])
def test_a_graph_that_is_used_once_is_freed_on_the_way(curvature: Any, k: int) -> None:
    layers = (nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6))
    model_fn, params = hf.functional(nn.Sequential(*layers))
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    batch = torch.randn(512, 64), torch.arange(512) % 64
    block = hf.random_like(params, k, seed=0)
    peaks, products = [], []
    for keep in (True, False):
        with Footprint() as memory:
            matvec = hf.over_batches(curvature(loss, chunk_size=1), keep=keep)
            products.append(rows(matvec(params, [batch])(block)))
        peaks.append(memory.peak)
    assert torch.equal(*products)
    if curvature is hf.hvp and k == 1:
        # The peak of more vectors is that of the first product.
        assert peaks[1] < 0.95 * peaks[0]
