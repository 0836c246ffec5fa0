from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessfunc.algorithms.eigen.subspace import Subspace
from hessfunc.spaces.of import space_of

N = 12
LIKE = torch.zeros(N, dtype=torch.float64)


def symmetric(seed: int) -> Tensor:
    root = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root + root.mT


def grown(A: Tensor, B: Tensor | None) -> Subspace:
    """Span of six B-orthonormal rows, in two steps."""
    space = space_of(LIKE)
    rows = symmetric(1)[:6]
    metric = torch.eye(N, dtype=torch.float64) if B is None else B
    lower = torch.linalg.cholesky(rows @ metric @ rows.mT)
    rows = torch.linalg.solve_triangular(lower, rows, upper=False)
    span = Subspace.empty(space, has_metric=B is not None)
    for part in rows.split(3):
        span = span.extended(space, part, part @ A, part @ metric, size=10, tolerance=1e-8)
    return span


@pytest.mark.parametrize("has_metric", [False, True])
def test_pairs_and_restarts_are_those_of_the_dense_matrices(has_metric: bool) -> None:
    space, A = space_of(LIKE), symmetric(0)
    B = symmetric(2) @ symmetric(2) + torch.eye(N) if has_metric else None
    metric = torch.eye(N, dtype=torch.float64) if B is None else B
    span = grown(A, B)
    rows = span.basis.rows
    torch.testing.assert_close(span.projected, rows @ A @ rows.mT)
    pairs = span.pairs(space, torch.tensor([0, 5])).at(torch.tensor([1, 0]))
    outside = pairs.vectors @ A - pairs.values[:, None] * (pairs.vectors @ metric)
    torch.testing.assert_close(pairs.outside, outside)
    torch.testing.assert_close(pairs.lengths, outside.norm(dim=1))
    torch.testing.assert_close(pairs.values[0], torch.linalg.eigvalsh(span.projected)[5])
    short = span.restarted(space, torch.tensor([1, 4]))
    kept = short.basis.rows
    torch.testing.assert_close(kept @ metric @ kept.mT, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(kept @ A @ kept.mT, short.projected)
    torch.testing.assert_close(short.images.rows, kept @ A)
    torch.testing.assert_close(short.duals.rows, kept @ metric)


def test_products_of_an_asymmetric_matrix_are_refused() -> None:
    A = symmetric(0)
    A[0, 1] += 1
    with pytest.raises(ValueError, match="not symmetric"):
        grown(A, None)
