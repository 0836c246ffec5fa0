"""Products with a constant symmetric matrix under autograd and torch.func."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hessfunc.autograd.constant_matrix import leaves_of_graph, of_vectors, refusing_gradients
from tests.reference import random_symmetric

A = random_symmetric(5)
CALLS: list[int] = []


def product(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
    """The product of A with a block of two leaves, of 2 and 3 entries."""
    CALLS.append(len(tangents[0]))
    rows = torch.cat([t.detach() for t in tangents], dim=1) @ A
    return rows[:, :2], rows[:, 2:]


def applied(rows: Tensor) -> Tensor:
    return torch.cat(of_vectors(product, [rows[:, :2], rows[:, 2:]]), dim=1)


def test_derivatives_of_every_kind_are_products_with_the_same_matrix() -> None:
    v, w = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(applied(v), v @ A)
    moving = v.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(applied(moving), moving, w)
    torch.testing.assert_close(pulled, w @ A)
    torch.testing.assert_close(torch.func.jvp(applied, (v,), (w,))[1], w @ A)
    quadratic = lambda v: (v * applied(v)).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(quadratic)(v), 2 * v @ A)


def test_a_mapped_axis_joins_the_block_in_one_pass() -> None:
    v = torch.randn(4, 3, 5, dtype=torch.float64)
    CALLS.clear()
    torch.testing.assert_close(torch.vmap(applied)(v), v @ A)
    assert CALLS == [12]


def test_a_gradient_that_would_leave_tensors_out_is_refused() -> None:
    weight, v = torch.ones(2, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
    (out,) = refusing_gradients([weight], [applied(v)], "weight is constant")
    torch.testing.assert_close(out.detach(), v @ A)
    with pytest.raises(RuntimeError, match="^weight is constant$"):
        out.sum().backward()


def test_leaves_of_a_graph_are_all_that_require_a_gradient_but_the_inputs() -> None:
    x, w, b = (torch.randn(3, requires_grad=True) for _ in range(3))
    ends = [(x * w).sin() + b, torch.ones(3), x.exp()]
    assert set(map(id, leaves_of_graph(ends, [x]))) == {id(w), id(b)}
    assert leaves_of_graph([torch.ones(3)], []) == []
