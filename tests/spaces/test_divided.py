"""Sums, norms and factors of rows whose columns are divided among ranks."""

from __future__ import annotations

import torch
from torch import Tensor

import hessfunc as hf
from tests.distributed import problems
from tests.distributed.ranks import Ranks


def rows(count: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, n, dtype=torch.float64, generator=generator)


def arithmetic(count: int, n: int) -> tuple[float, float, float]:
    """Largest errors of inner products, of norms, and of the factors of rows."""
    like = torch.zeros(n, dtype=torch.float64)
    whole = rows(count, n)
    space = hf.sharded(like, problems.mesh(torch.distributed.get_world_size()))
    part = whole[:, space.columns.start : space.columns.stop]
    gram = (space.gram(part, part) - whole @ whole.mT).abs().max()
    norms = (space.norms(part) - whole.norm(dim=1)).abs().max()
    basis, triangle = space.factored(part)
    rebuilt = (triangle.mT @ basis - part).abs().max() if part.numel() else torch.zeros(())
    orthonormal = (space.gram(basis, basis) - torch.eye(count)).abs().max()
    return float(gram), float(norms), float(torch.maximum(rebuilt, orthonormal))


def test_divided_rows_have_the_products_norms_and_factors_of_whole_ones(three: Ranks) -> None:
    for count, n in ((1, 40), (4, 41), (5, 6)):
        for errors in three.run(arithmetic, count, n):
            assert max(errors) < 1e-12


def fails_on_one() -> None:
    space = hf.sharded(torch.zeros(8), problems.mesh(2))
    space.on_all(lambda: 1 / (1 - torch.distributed.get_rank()))


def test_an_error_on_one_rank_is_an_error_on_all(two: Ranks) -> None:
    first, second = two.outcomes(fails_on_one)
    assert second.error == "ZeroDivisionError: division by zero"
    assert first.error is not None
    assert "rank 1: ZeroDivisionError" in first.error
