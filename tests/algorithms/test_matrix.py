"""Whole matrices and blocks, from products with unit vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from hessfunc.algorithms import matrix as module
from tests import reference
from tests.reference.spectra import symmetric

N = 20
MATRIX = torch.randn(N, N, generator=torch.Generator().manual_seed(0)).double()
# The first leaf has the entries 0 to 5, the second 6 to 9, the last 10 to 19.
LIKE = {
    "first": {"weight": torch.zeros(2, 3).double(), "bias": torch.zeros(4).double()},
    "last": torch.zeros(10).double(),
}


class Counted:
    """Products with the matrix, which is not symmetric, and the widths of their blocks."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def __call__(self, block: Any) -> Any:
        rows = reference.rows(block)
        self.widths.append(len(rows))
        return reference.block_like(LIKE, rows @ MATRIX.mT)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
def test_whole_matrix(chunk_size: int | None) -> None:
    matvec = Counted()
    assert torch.equal(hf.matrix(matvec, LIKE, chunk_size=chunk_size), MATRIX)
    assert sum(matvec.widths) == N
    assert max(matvec.widths) == min(chunk_size or N, N)


@pytest.mark.parametrize(
    ("select", "indices"),
    [
        ("first.*", range(10)),
        ("*bias", range(6, 10)),
        (["last", "first.weight"], [*range(6), *range(10, 20)]),
        (lambda name, leaf: leaf.dim() == 2, range(6)),
        ([19, 0, 3], [19, 0, 3]),
        (torch.tensor([2, 5]), [2, 5]),
        (range(4, 8), range(4, 8)),
        ((1, 1), [1, 1]),
    ],
)
def test_blocks(select: Any, indices: Any) -> None:
    chosen = list(indices)
    matvec = Counted()
    columns = hf.matrix(matvec, LIKE, columns=select)
    assert torch.equal(columns, MATRIX[:, chosen])
    # Only the columns cost products.
    assert sum(matvec.widths) == len(chosen)
    assert torch.equal(hf.matrix(Counted(), LIKE, rows=select), MATRIX[chosen])
    corner = hf.matrix(Counted(), LIKE, rows=select, columns=[7, 8, 11], chunk_size=2)
    assert torch.equal(corner, MATRIX[chosen][:, [7, 8, 11]])


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    hf.matrix(Counted(), LIKE, columns=range(7), chunk_size=3, callback=lambda *x: seen.append(x))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_hessian_and_the_diagonal_of_its_last_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    batch = torch.randn(9, 3).double(), torch.arange(9) % 2
    dense = reference.hessian(loss, params, batch)
    matvec = hf.hvp(loss)(params, batch)
    torch.testing.assert_close(hf.matrix(matvec, params), dense, rtol=0, atol=1e-14)
    block = hf.matrix(matvec, params, rows="2.*", columns="2.*")
    torch.testing.assert_close(block.diagonal(), dense.diagonal()[16:], rtol=0, atol=1e-14)
    # Holding the other parameters gives the same block with cheaper products.
    head, rest = hf.split(params, "2.*")
    held = hf.matrix(hf.hvp(hf.hold(loss, rest))(head, batch), head)
    torch.testing.assert_close(held, dense[16:, 16:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dense_is_the_inverse_function(dtype: torch.dtype) -> None:
    matrix = symmetric(torch.linspace(-1, 2, 30)).to(dtype)
    again = hf.matrix(hf.dense(matrix), torch.zeros(30, dtype=dtype))
    assert torch.equal(again, matrix.to(again.dtype))
    assert again.dtype == torch.promote_types(dtype, torch.float32)


def test_a_matrix_that_does_not_fit_is_refused_before_any_product() -> None:
    like = torch.zeros(10_000_000)
    with pytest.raises(
        MemoryError, match=r"10000000 x 10000000 entries .* take 37\d+\.\d GiB, but"
    ):
        hf.matrix(Counted(), like)


def test_a_chunk_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda device: 8 * (N * N + 3 * 2 * N))
    assert torch.equal(hf.matrix(Counted(), LIKE, chunk_size=2), MATRIX)
    with pytest.raises(MemoryError, match="with 3 products at a time"):
        hf.matrix(Counted(), LIKE, chunk_size=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": "middle"}, ValueError, "'middle' chooses none of the leaves first.weight"),
        ({"columns": ["last", "middle"]}, ValueError, "there is no leaf named middle"),
        ({"columns": [3, 20]}, ValueError, "columns contains the index 20, but .* 20 entries"),
        ({"rows": [-1]}, ValueError, "rows contains the index -1"),
        ({"rows": []}, ValueError, "rows is empty"),
        ({"rows": 3}, TypeError, "rows must be a glob, a list of names or a predicate"),
        ({"rows": [0.5]}, ValueError, "it must be a whole number"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0: it must be at least 1"),
        ({"callback": 3}, TypeError, "callback must be a function"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hf.matrix(Counted(), LIKE, **options)


def test_product_that_is_not_finite() -> None:
    broken: Callable[[Tensor], Tensor] = lambda block: block * torch.nan  # noqa: E731
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        hf.matrix(broken, torch.zeros(3))
