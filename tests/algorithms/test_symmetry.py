"""Matrices that are not symmetric, and random products, are told from rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.reference.spectra import symmetric


@pytest.mark.parametrize("estimate", [hf.hutchpp, hf.xtrace, hf.xnystrace, hf.xdiag])
def test_products_rounded_to_bfloat16_in_float32_are_symmetric(estimate: Any) -> None:
    factor = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    matrix = factor @ factor.T + 100 * torch.eye(200)
    found = estimate(
        lambda block: (block @ matrix).bfloat16().float(), torch.zeros(200), max_matvecs=40, seed=0
    )
    assert found.matvecs <= 40


@pytest.mark.parametrize("estimate", [hf.hutchpp, hf.xtrace, hf.xnystrace, hf.xdiag])
def test_noise_as_large_as_the_rounding_of_bfloat16_is_refused(estimate: Any) -> None:
    entries = torch.arange(1.0, 201.0)
    random = torch.Generator().manual_seed(0)

    def product(block: torch.Tensor) -> torch.Tensor:
        return block * entries * (1 + 0.01 * torch.randn(block.shape, generator=random))

    with pytest.raises(ValueError, match="not deterministic"):
        estimate(product, torch.zeros(200), max_matvecs=40, seed=0)


POSITIVE = symmetric(torch.logspace(-2, 1, 400))
SKEW = torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SKEW = (SKEW - SKEW.mT) * (POSITIVE.norm() / (SKEW - SKEW.mT).norm())
B = torch.linspace(-1, 2, 400, dtype=torch.float64)
RUNS: dict[str, Callable[..., Any]] = {
    "cg": lambda matvec, b: hf.cg(matvec, b, rtol=1e-4, max_matvecs=300),
    "minres": lambda matvec, b: hf.minres(matvec, b, rtol=1e-4, max_matvecs=300),
    "minres, preconditioned": lambda matvec, b: hf.minres(
        matvec, b, rtol=1e-4, max_matvecs=300, preconditioner=lambda v: v / (1 + b.abs())
    ),
    "power": lambda matvec, b: hf.power_iteration(matvec, b, rtol=1e-4, max_matvecs=200, seed=0),
    "power, momentum": lambda matvec, b: hf.power_iteration(
        matvec, b, rtol=1e-4, max_matvecs=200, seed=0, which="SA", momentum=5.0
    ),
}


def ended(run: str, matvec: Callable[[Tensor], Tensor], dtype: torch.dtype) -> str:
    """What the run says, in its reason or in an error, which is none where it has converged."""
    try:
        return str(RUNS[run](matvec, B.to(dtype)).reason)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [1e-2, 0.1, 1.0])
@pytest.mark.parametrize("run", RUNS)
def test_a_solver_names_a_matrix_that_is_not_symmetric(
    run: str, part: float, dtype: torch.dtype
) -> None:
    matrix = (POSITIVE + part * SKEW).mT.to(dtype)
    assert "matvec is not symmetric" in ended(run, lambda v: v @ matrix, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("run", RUNS)
def test_a_solver_names_random_products(run: str, part: float, dtype: torch.dtype) -> None:
    matrix, generator = POSITIVE.to(dtype), torch.Generator().manual_seed(0)

    def noisy(block: Tensor) -> Tensor:
        noise = torch.randn(block.shape, dtype=dtype, generator=generator)
        return (block @ matrix) * (1 + part * noise)

    assert "not deterministic" in ended(run, noisy, dtype)


@pytest.mark.parametrize("inside", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spectrum", [POSITIVE, symmetric(torch.logspace(-7, 1, 400))])
@pytest.mark.parametrize("run", RUNS)
def test_a_solver_does_not_blame_rounding_on_the_matrix(
    run: str, spectrum: Tensor, dtype: torch.dtype, inside: torch.dtype | None
) -> None:
    """Neither low precision nor a large condition number looks like an asymmetry."""
    matrix = spectrum.to(torch.promote_types(dtype, torch.float32))

    def rounded(block: Tensor) -> Tensor:
        product = block.to(matrix) @ matrix
        return product.to(inside or product.dtype).to(dtype)

    said = ended(run, rounded, dtype)
    assert "symmetric" not in said
    assert "deterministic" not in said


@pytest.mark.parametrize("estimate", [hf.hutchpp, hf.xtrace, hf.xnystrace, hf.xdiag])
@pytest.mark.parametrize("random", [False, True])
def test_a_thousandth_in_float32_is_refused(estimate: Any, random: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = (POSITIVE + (0 if random else 1e-3) * SKEW).mT.float()

    def product(block: Tensor) -> Tensor:
        noise = torch.randn(block.shape, generator=generator) if random else torch.zeros(())
        return (block @ matrix) * (1 + 1e-3 * noise)

    with pytest.raises(ValueError, match="not symmetric, not linear or not deterministic"):
        estimate(product, B.float(), max_matvecs=60, seed=0)
