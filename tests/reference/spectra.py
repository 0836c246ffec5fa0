"""Matrices whose spectrum is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import hessfunc as hf

# Spectrum with a few separated eigenvalues at both ends, and a vector of its space.
SPECTRUM = torch.cat([torch.linspace(-1, 1, 180), torch.tensor([9.0, -7.0, 5.0, -4.0, 3.0, 2.0])])


VECTOR = torch.zeros(len(SPECTRUM), dtype=torch.float64)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues and a random eigenbasis."""
    basis = orthogonal(len(eigenvalues), seed)
    matrix = basis @ eigenvalues.double().diag() @ basis.mT
    return (matrix + matrix.mT) / 2


def spiked(n: int = 2000, spikes: tuple[float, ...] = (5.0, 4.0, 3.0), seed: int = 0) -> Tensor:
    """``X + ZZ'/n`` with X diagonal: each spike s gives an outlier near s + s / (s - 1).

    Z is square and standard normal; X holds the spikes.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, n, dtype=torch.float64, generator=generator)
    matrix = z @ z.mT / n
    matrix.diagonal()[: len(spikes)] += torch.tensor(spikes, dtype=torch.float64)
    return matrix


def decaying(n: int) -> dict[str, Tensor]:
    """Spectra that are flat, that decay, and that jump: what estimators are tried on."""
    index = torch.arange(1.0, n + 1, dtype=torch.float64)
    return {
        "flat": torch.linspace(1, 3, n, dtype=torch.float64),
        "polynomial": index**-2,
        "slow exponential": 0.9**index,
        "exponential": 0.7**index,
        "step": torch.where(index <= n // 20, 1.0, 1e-3).double(),
        "deep step": torch.where(index <= n // 20, 1.0, 1e-8).double(),
    }


def measured_residuals(matrix: Tensor, found: hf.results.Eigenpairs) -> Tensor:
    images = found.vectors.double() @ matrix
    return (images - found.values[:, None] * found.vectors.double()).norm(dim=1)


def positive_definite(n: int, seed: int = 0) -> Tensor:
    """A positive definite matrix, its eigenvalues at least 1."""
    factor = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.mT + torch.eye(n)


def counted(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """The products of a matrix, and how many vectors each call multiplied."""
    calls: list[int] = []

    def matvec(block: Tensor) -> Tensor:
        calls.append(len(block))
        return block @ matrix

    return matvec, calls
