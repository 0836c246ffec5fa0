"""Smoothed spectral density of a linear operator, on a linear or logarithmic grid."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessfunc.algorithms.density import slq
from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.algorithms.results import Density
from hessfunc.compat.curvlinops.arguments import OF_MATRIX
from hessfunc.compat.curvlinops.matvecs import as_matvec
from hessfunc.compat.curvlinops.operator import PyTorchLinearOperator
from hessfunc.compat.gaussians import mixture
from hessfunc.compat.place import seed_of_stream
from hessfunc.options import at_least, validated

Boundaries: TypeAlias = tuple[float | None, float | None] | None
_Array: TypeAlias = NDArray[np.float64]


@validated(**OF_MATRIX)
def lanczos_approximate_spectrum(
    A: PyTorchLinearOperator | Tensor,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """Estimate the spectral density by `slq`, smoothed by Gaussians.

    Args:
        A: Symmetric operator or tensor.
        ncv: Number of Lanczos steps.
        num_points: Number of points of the grid.
        num_repeats: Number of runs from random vectors.
        kappa: Width of a Gaussian, above 1: neighbours at the mean distance of the nodes meet at
            the fraction 1/kappa of their height.
        boundaries: Smallest and largest eigenvalue; `lanczos` computes each that is None.
        margin: Length by which the grid is extended at each end, as a fraction of its length.
        boundaries_tol: Relative tolerance of the boundaries.

    Returns:
        Grid ``(num_points,)`` and density, whose integral is about 1.

    Source: Papyan 2020, JMLR 21(252).
    """
    runs = LanczosApproximateSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return runs.approximate_spectrum(num_repeats, num_points, kappa, margin)


@validated(**OF_MATRIX)
def lanczos_approximate_log_spectrum(
    A: PyTorchLinearOperator | Tensor,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Estimate the density of ``|value| + epsilon`` over the eigenvalues, on a logarithmic grid.

    Arguments are those of `lanczos_approximate_spectrum`, where ``boundaries`` are the smallest and
    the largest absolute eigenvalue. The smallest one is that of the nodes if it is None.

    Args:
        epsilon: Shift of the absolute eigenvalues.

    Returns:
        Grid ``(num_points,)`` and density, whose integral is about 1.
    """
    runs = LanczosApproximateLogSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return runs.approximate_log_spectrum(num_repeats, num_points, kappa, margin, epsilon)


class _Runs:
    """Lanczos runs of an operator, which estimates with other options share.

    Args:
        A: Symmetric operator or tensor.
        ncv: Number of Lanczos steps, at least 2.
        boundaries: Ends of the spectrum; None where they are not known.
        boundaries_tol: Relative tolerance of the ends.
    """

    @validated(**OF_MATRIX)
    def __init__(
        self,
        A: PyTorchLinearOperator | Tensor,
        ncv: int,
        boundaries: Boundaries = None,
        boundaries_tol: float = 1e-2,
    ) -> None:
        at_least(2, ncv=ncv)
        self.A, self.ncv = A, ncv
        self.boundaries, self.boundaries_tol = boundaries, boundaries_tol
        self._densities: list[Density] = []

    def _first(self, num_repeats: int) -> tuple[_Array, _Array]:
        """Return nodes and weights ``(num_repeats, m)`` of the first runs."""
        at_least(1, num_repeats=num_repeats)
        missing = num_repeats - len(self._densities)
        matvec, like = as_matvec(self.A)
        for _ in range(missing):
            run = slq(matvec, like, steps=self.ncv, seed=seed_of_stream())
            self._densities.append(run)
        chosen = self._densities[:num_repeats]
        width = max(run.nodes.shape[1] for run in chosen)
        nodes, weights = np.zeros((num_repeats, width)), np.zeros((num_repeats, width))
        for i, run in enumerate(chosen):
            nodes[i, : run.nodes.shape[1]] = run.nodes[0].numpy()
            weights[i, : run.nodes.shape[1]] = run.weights[0].numpy()
        return nodes, weights

    def _end(self, which: Literal["SA", "LA", "LM"]) -> float:
        """Return the eigenvalue at one end of the spectrum."""
        matvec, like = as_matvec(self.A)
        tolerance = max(self.boundaries_tol, torch.finfo(like.dtype).eps)
        pairs = lanczos(matvec, like, k=1, which=which, rtol=tolerance, seed=seed_of_stream())
        return float(pairs.values[0])

    def _tensors(self, grid: _Array, density: _Array) -> tuple[Tensor, Tensor]:
        like = torch.zeros((), dtype=self.A.dtype, device=self.A.device)
        return torch.from_numpy(grid).to(like), torch.from_numpy(density).to(like)

    def _smoothed(self, grid: _Array, nodes: _Array, weights: _Array, kappa: float) -> _Array:
        """Return the mean over runs of normal densities at the nodes, on an equidistant grid."""
        if kappa <= 1:
            raise ValueError(f"kappa={kappa:g}: it must be above 1, such as kappa=3.0")
        # exp(-(h/2)^2 / (2 sigma^2)) = 1 / kappa at half of the mean distance h of the nodes.
        distance = (grid[-1] - grid[0]) / (self.ncv - 1)
        sigma = distance / math.sqrt(8 * math.log(kappa))
        total = mixture(grid, nodes, weights, sigma**2)
        return total / (len(nodes) * math.sqrt(2 * math.pi) * sigma)


class LanczosApproximateSpectrumCached(_Runs):
    """Estimates of `lanczos_approximate_spectrum` that share their runs."""

    @validated(**OF_MATRIX)
    def approximate_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
    ) -> tuple[Tensor, Tensor]:
        """Return the grid and the density, as `lanczos_approximate_spectrum` does."""
        low, high = self._ends()
        grid = _extended(low, high, margin, num_points)
        return self._tensors(grid, self._smoothed(grid, *self._first(num_repeats), kappa))

    def _ends(self) -> tuple[float, float]:
        low, high = self.boundaries or (None, None)
        low = self._end("SA") if low is None else low
        high = self._end("LA") if high is None else high
        self.boundaries = low, high
        return low, high


class LanczosApproximateLogSpectrumCached(_Runs):
    """Estimates of `lanczos_approximate_log_spectrum` that share their runs."""

    @validated(**OF_MATRIX)
    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
        epsilon: float = 1e-5,
    ) -> tuple[Tensor, Tensor]:
        """Return the grid and the density, as `lanczos_approximate_log_spectrum` does."""
        nodes, weights = self._first(num_repeats)
        sizes = np.abs(nodes)
        low, high = self.boundaries or (None, None)
        low = float(sizes[weights > 0].min()) if low is None else low
        high = abs(self._end("LM")) if high is None else high
        self.boundaries = low, high
        logs = _extended(math.log(low + epsilon), math.log(high + epsilon), margin, num_points)
        density = self._smoothed(logs, np.log(sizes + epsilon), weights, kappa)
        # p(x) = p(log x) / x.
        return self._tensors(np.exp(logs), density / np.exp(logs))


def _extended(low: float, high: float, margin: float, num_points: int) -> _Array:
    at_least(2, num_points=num_points)
    padding = margin * (high - low)
    return np.linspace(low - padding, high + padding, num_points)
