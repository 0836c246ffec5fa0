"""Log determinants, covariances and roots of ``s G + D``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.kronecker import Dense, Kronecker
from hessfunc.recipes.laplace.precision import BlockDiagonal, LowRank, positive, prior_of
from hessfunc.spaces.of import space_of

D = torch.float64
LIKE = {"w": torch.zeros(2, 3, dtype=D), "b": torch.zeros(2, dtype=D)}
SCALE = torch.tensor(3.0, dtype=D)
PRIORS: dict[str, Any] = {"one": 0.5, "per leaf": {"w": 0.5, "b": 2.0}}


def _semidefinite(n: int, rank: int, seed: int) -> Tensor:
    root = torch.randn(n, rank, dtype=D, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT


def _low_rank(rank: int) -> tuple[LowRank, Tensor]:
    matrix = _semidefinite(8, rank, 0)
    values, vectors = torch.linalg.eigh(matrix)
    return LowRank(values[-rank:], vectors.mT[-rank:]), matrix


def _blocks() -> tuple[BlockDiagonal, Tensor]:
    left, right = _semidefinite(2, 1, 1), _semidefinite(3, 3, 2)
    own = _semidefinite(2, 2, 3)
    shapes = LIKE["w"].shape, LIKE["b"].shape
    blocks = {"w": Kronecker(left[None], right[None], shapes[0]), "b": Dense(own, shapes[1])}
    return BlockDiagonal(blocks), torch.block_diag(torch.kron(left, right), own)


CASES = {"rank 3": lambda: _low_rank(3), "rank n": lambda: _low_rank(8), "blocks": _blocks}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("case", CASES)
def test_all_functions_are_those_of_the_dense_matrix(case: str, prior: str) -> None:
    curvature, matrix = CASES[case]()
    made = prior_of(LIKE, PRIORS[prior])
    each = torch.cat([made.of(name).expand(leaf.numel()) for name, leaf in LIKE.items()])
    precision = SCALE * matrix + each.diag()
    torch.testing.assert_close(
        curvature.logdet(SCALE, made), precision.logdet(), rtol=1e-10, atol=0
    )
    covariance = hf.matrix(lambda v: curvature.covariance(v, SCALE, made), LIKE)
    torch.testing.assert_close(covariance, precision.inverse(), rtol=1e-8, atol=1e-10)
    root = hf.matrix(lambda v: curvature.root(v, SCALE, made), LIKE)
    torch.testing.assert_close(root @ root.mT, precision.inverse(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("case", CASES)
def test_the_log_determinant_is_differentiable(case: str, prior: str) -> None:
    curvature, _ = CASES[case]()

    def logdet(scale: Tensor, w: Tensor, b: Tensor) -> Tensor:
        given: Any = {"w": w, "b": b} if isinstance(PRIORS[prior], dict) else w * b
        return curvature.logdet(scale, prior_of(LIKE, given))

    inputs = [torch.tensor(x, dtype=D, requires_grad=True) for x in (3.0, 0.5, 2.0)]
    assert torch.autograd.gradcheck(logdet, inputs)


def test_a_precision_must_be_positive() -> None:
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be positive and finite"):
            positive("noise", value, space_of(LIKE))
