"""Conversions between trees and flat vectors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

import hessfunc as hf
from hessfunc.spaces.of import space_of
from hessfunc.trees import leaves


def some_tree() -> dict[str, Any]:
    """A nested tree whose keys are not in alphabetical order."""
    return {
        "z": torch.arange(6.0).reshape(2, 3),
        "a": {"y": torch.tensor(6.0), "b": [torch.arange(7.0, 9.0), torch.zeros(0, 3)]},
        "m": (torch.tensor([9.0]),),
    }


def test_ravel_keeps_the_order_of_keys() -> None:
    assert hf.ravel(some_tree()).tolist() == list(range(10))


shapes = st.lists(st.integers(0, 3), max_size=3)


trees = st.recursive(
    shapes,
    lambda inner: (
        st.lists(inner.map(lambda x: ("node", x)), min_size=1, max_size=3)
        | st.dictionaries(st.text("abz", min_size=1), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def with_tensors(shaped: Any, k: int | None = None) -> Any:
    """The tree of zeros with these shapes, or a block of k."""
    if isinstance(shaped, dict):
        return {key: with_tensors(value, k) for key, value in shaped.items()}
    if isinstance(shaped, list) and shaped and isinstance(shaped[0], tuple):
        return [with_tensors(value, k) for _, value in shaped]
    return torch.zeros([*([] if k is None else [k]), *shaped])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(shaped=trees, k=st.integers(0, 3))
def test_unravel_undoes_ravel_on_any_tree(shaped: Any, k: int) -> None:
    like = with_tensors(shaped)
    space = space_of(like)
    flat, rows = torch.randn(space.n), torch.randn(k, space.n)
    assert torch.equal(hf.ravel(hf.unravel(flat, like)), flat)
    block = hf.unravel(rows, like)
    assert _pytree.tree_structure(block) == _pytree.tree_structure(like)
    assert [x.shape for x in leaves(block)] == [x.shape for x in leaves(with_tensors(shaped, k))]
    assert torch.equal(space.ravel(block), rows)


def test_a_bare_tensor_is_a_tree() -> None:
    assert hf.unravel(torch.arange(6.0), torch.zeros(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("rows", [torch.arange(10.0), torch.arange(30.0).reshape(3, 10)])
def test_trees_and_blocks_are_views_of_flat_rows(rows: Tensor) -> None:
    views = leaves(hf.unravel(rows, some_tree()))
    starts = [0, 6, 7, 9, 9]
    for view, start in zip(views, starts, strict=True):
        assert view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        assert view.storage_offset() == start


def test_leaves_of_another_dtype_are_converted_and_rows_promoted() -> None:
    like = {"half": torch.zeros(2, dtype=torch.bfloat16), "double": torch.zeros(1).double()}
    assert hf.ravel(like).dtype == torch.float64
    tree = hf.unravel(torch.arange(3.0), like)
    assert (tree["half"].dtype, tree["double"].dtype) == (torch.bfloat16, torch.float64)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": torch.zeros(2, dtype=torch.int64)}, TypeError, "'a' has dtype torch.int64"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, TypeError, "real floating-point"),
        ({"a": {"b": 1.0}}, TypeError, "'a.b' is a float, not a tensor"),
        ({}, ValueError, "no leaf: check that not all parameters"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")},
            ValueError,
            r"several devices, \['cpu', 'meta'\]",
        ),
    ],
)
def test_what_is_not_a_vector_is_refused(tree: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        space_of(tree)


@pytest.mark.parametrize("shape", [(9,), (2, 11), (2, 1, 10), ()])
def test_flat_rows_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass one of shape \(10,\) or \(k, 10\)"):
        hf.unravel(torch.zeros(shape), some_tree())


def test_inner_accumulates_in_float64() -> None:
    # In float32, each product would be rounded, and the sum would lose the small entries.
    a = {"x": torch.tensor([1e6, 1.0, -1e6]), "y": [torch.full((1000,), 1 / 3)]}
    b = {"x": torch.tensor([1e6, 1.0, 1e6]), "y": [torch.full((1000,), 3.0)]}
    product = hf.inner(a, b)
    assert product.dtype == torch.float64
    assert product.dim() == 0
    third = float(torch.tensor(1 / 3))
    assert float(product) == pytest.approx(1.0 + 3000 * third, rel=1e-12)


def test_inner_is_transformable() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 7, generator=generator).double()
    v = {"a": torch.randn(2, 3, generator=generator).double(), "b": torch.ones(()).double()}

    def form(v: dict[str, Tensor]) -> Tensor:
        return hf.inner(v, hf.unravel(matrix @ hf.ravel(v), v))

    flat = hf.ravel(v)
    both = matrix + matrix.mT
    torch.testing.assert_close(hf.ravel(torch.func.grad(form)(v)), both @ flat)
    hessian = torch.func.jacfwd(lambda x: torch.func.grad(lambda y: hf.inner(y, matrix @ y))(x))
    torch.testing.assert_close(hessian(flat), both)
    rows = torch.randn(5, 7, generator=generator).double()
    mapped = torch.vmap(lambda row: hf.inner(row, matrix @ row))(rows)
    torch.testing.assert_close(mapped, (rows * (rows @ matrix.mT)).sum(1))
    # Plain autograd, in the dtype of the leaf.
    leaf = torch.ones(4, requires_grad=True)
    hf.inner([leaf], [torch.arange(4.0)]).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0, 1, 2, 3]
    assert leaf.grad.dtype == torch.float32
    compiled = torch.compile(hf.inner, backend="eager", fullgraph=True)
    assert float(compiled({"a": rows}, {"a": rows})) == pytest.approx(float(rows.square().sum()))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, ValueError, r"a has 1 leaves \(a \(2,\)\)"),
        (torch.ones(2), torch.ones(3), ValueError, r"and b has 1 leaves \(params \(3,\)\)"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), TypeError, "dtype torch.int64"),
        (torch.ones(2) + 0j, torch.ones(2), TypeError, "dtype torch.complex64"),
        ({"a": 1.0}, {"a": torch.ones(2)}, TypeError, "a must be a tree of tensors"),
        ({}, {}, ValueError, "without tensors"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, "b is on the meta device"),
    ],
)
def test_inner_of_other_vectors(a: Any, b: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hf.inner(a, b)
