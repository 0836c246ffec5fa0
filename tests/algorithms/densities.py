"""Spectral densities of matrices whose eigenvalues are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

import hessfunc as hf
from hessfunc.algorithms.results import Density
from tests.reference.spectra import spiked

SPECTRUM = torch.linspace(-1, 3, 200)
VECTOR = torch.zeros(200, dtype=torch.float64)
GEOMETRIC = 0.9 ** torch.arange(300, dtype=torch.float64)


@cache
def spiked_spectrum() -> torch.Tensor:
    return torch.linalg.eigvalsh(spiked())


def diagonal(spectrum: torch.Tensor, probes: int, steps: int, seed: int) -> Density:
    """The density of a diagonal matrix, as good as any: a probe on the sphere has no direction."""
    matvec = hf.batched(lambda v: spectrum * v)
    return hf.slq(matvec, torch.zeros_like(spectrum), probes=probes, steps=steps, seed=seed)


def shares(draws: int, probes: int, n: int, seed: int = 0) -> torch.Tensor:
    """Weights of exact quadratures, ``(draws, probes, n)``: squares of points on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(draws, probes, n, dtype=torch.float64, generator=generator).square()
    return square / square.sum(-1, keepdim=True)


def of_nodes(
    nodes: list[list[float]], weights: list[list[float]], n: int, residual: float = 0.0
) -> Density:
    where = torch.tensor(nodes, dtype=torch.float64)
    return Density(
        nodes=where,
        weights=torch.tensor(weights, dtype=torch.float64),
        residuals=torch.full_like(where, residual),
        n=n,
        matvecs=7,
        passes=5,
        reason="made up",
        seed=3,
    )


DECAY = torch.logspace(0, -8, 1000, dtype=torch.float64)
BRACKETED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, float]]] = {
    "log": (torch.log, {"smallest": 1e-8}),
    "resolvent": (lambda x: 1 / (x + 1e-4), {"smallest": 0.0}),
    "ratio": (lambda x: x / (x + 1e-6), {"smallest": 0.0}),
    "square root": (torch.sqrt, {"smallest": 0.0}),
    "exponential": (torch.exp, {}),
    "kink": (lambda x: (x - 0.1).clamp_min(0), {}),
    "step": (lambda x: (x > 1e-3).to(torch.float64), {}),
    "wave": (lambda x: torch.cos(5 * x), {}),
    "identity": (lambda x: x, {}),
}
