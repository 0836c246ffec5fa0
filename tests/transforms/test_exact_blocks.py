"""Exact diagonal blocks, made at each lookup."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.optim.newton import newton
from hessfunc.transforms.exact_blocks import exact_blocks
from tests.graphs import counted_graphs
from tests.optim.problem import CURVATURES, once, problem


def test_blocks_of_a_literal_hessian() -> None:
    H = torch.tensor([[1.0, 4, 5], [4, 2, 6], [5, 6, 3]], dtype=torch.float64)

    def loss(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        z = torch.cat([params["a"], params["b"]])
        return z @ H @ z / 2

    params = {"a": torch.ones(1).double(), "b": torch.tensor([2.0, -1.0]).double()}
    blocks = exact_blocks(hf.hvp, loss)(params, None)
    assert list(blocks) == ["a", "b"]
    assert len(blocks) == 2
    torch.testing.assert_close(blocks["a"](torch.ones(1, 1).double()), H[:1, :1])
    torch.testing.assert_close(blocks["b"](torch.eye(2).double()), H[1:, 1:])


@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES)
def test_exact_blocks_are_the_diagonal_blocks(curvature: Any) -> None:
    loss, params, batch = problem()
    blocks = exact_blocks(curvature, loss)
    whole = hf.matvecs.per_block(curvature(loss)(params, batch), params)
    vectors = hf.random_like(params, 3, seed=1)
    expected = whole(vectors)
    # The second time at other parameters, as in training.
    for shift in (0.0, 0.1):
        moved = {name: leaf + shift for name, leaf in params.items()}
        expected = hf.matvecs.per_block(curvature(loss)(moved, batch), moved)(vectors)
        found = blocks(moved, batch)
        for name in params:
            torch.testing.assert_close(found[name](vectors[name]), expected[name])


def test_known_criteria_stay_known() -> None:
    # The Fisher matrix takes no criterion that it does not know.
    loss, params, batch = problem()
    blocks = exact_blocks(hf.fvp, loss)(params, batch)
    same = exact_blocks(hf.ggnvp, loss)(params, batch)
    v = torch.randn(1, *params["1.weight"].shape).double()
    torch.testing.assert_close(blocks["1.weight"](v), same["1.weight"](v))


def test_a_block_is_made_at_each_lookup_and_not_kept() -> None:
    made: list[int] = []

    def counted(loss: Any) -> Any:
        def curvature(params: Any, batch: Any) -> Any:
            made.append(1)
            return lambda block: block

        return curvature

    params = {"a": torch.zeros(2), "b": torch.zeros(())}
    blocks = exact_blocks(counted, lambda params, batch: torch.zeros(()))(params, None)
    assert set(blocks) == {"a", "b"}
    assert "a" in blocks
    assert "c" not in blocks
    assert not made
    assert torch.equal(blocks["b"](torch.ones(3)), torch.ones(3))
    blocks["b"]
    assert len(made) == 2
    with pytest.raises(KeyError):
        blocks["c"]


def test_a_step_holds_one_graph_at_a_time() -> None:
    loss, params, batch = problem()
    gradients = torch.func.grad(loss)(params, batch)
    blocks = exact_blocks(hf.hvp, loss)(params, batch)
    with counted_graphs() as together:
        kept = [blocks[name] for name in blocks]
    del kept
    with counted_graphs() as alone:
        first = blocks["1.weight"]
    del first
    with counted_graphs() as stepping:
        once(newton(), gradients, params, blocks)
    assert stepping.most == alone.most < together.most / 2


@pytest.mark.parametrize("changed", ["1.weight", "3.bias"])
def test_a_block_refuses_parameters_that_have_changed(changed: str) -> None:
    loss, params, batch = problem()
    curvature = partial(hf.hvp, mode="difference")
    block = exact_blocks(curvature, loss)(params, batch)["3.bias"]
    vector = torch.ones(1, 1).double()
    block(vector)
    params[changed].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        block(vector)
