"""Spectral density by Lanczos from random vectors, under the names of hessian_eigenthings."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.algorithms.density import slq
from hessfunc.compat.eigenthings.operator import Operator, Start, operator_like
from hessfunc.compat.gaussians import mixture, normalised
from hessfunc.options import at_least, flag, or_none, real, tensor, validated, whole_number


@validated(
    operator=operator_like,
    dim=whole_number,
    order=whole_number,
    draws=whole_number,
    get_density=flag,
    use_cuda=flag,
)
def stochastic_lanczos(
    operator: Operator,
    dim: int,
    order: int,
    draws: int,
    get_density: bool = False,
    use_cuda: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run Lanczos from random vectors by `slq`.

    Args:
        operator: Operator of the matrix.
        dim: Number of entries of a vector, which must be that of the operator.
        order: Number of steps of a run.
        draws: Number of runs.
        get_density: Whether to return a smoothed density instead of nodes and weights.
        use_cuda: Whether vectors are on CUDA, if available. Vectors of a model are on its device.

    Returns:
        ``(nodes, weights)``, each ``(draws, order)``, or ``(density, grids)`` of
        `eigv_to_density`.

    Raises:
        ValueError: If ``dim`` is not the size of the operator, or if a number is not positive.

    Cost: ``order`` products for each run.
    """
    at_least(1, order=order, draws=draws)
    start = Start.of(operator, use_gpu=use_cuda, fp16=False)
    if dim != start.like.numel():
        raise ValueError(
            f"dim={dim}: the operator has vectors of {start.like.numel()} entries, pass "
            f"dim={start.like.numel()}"
        )
    draw = operator.draws()
    matvec = operator.matvec() if draw is None else draw(0)
    density = slq(matvec, start.like, probes=draws, steps=order, seed=start.seed)
    nodes, weights = density.nodes, density.weights
    return eigv_to_density(nodes, weights, sigma_sq=1e-5) if get_density else (nodes, weights)


@validated(tridiag_list=tensor)
def tridiag_to_eigv(tridiag_list: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the tridiagonal matrices ``(draws, order, order)``."""
    nodes, vectors = torch.linalg.eigh(tridiag_list.double())
    return nodes, vectors[..., 0, :].square()


@validated(tridiag_list=tensor, sigma_sq=real, grid_len=whole_number)
def tridiag_to_density(
    tridiag_list: Tensor, sigma_sq: float = 1e-5, grid_len: int = 10000
) -> tuple[Tensor, Tensor]:
    """Return the smoothed density of tridiagonal matrices, as in `eigv_to_density`."""
    nodes, weights = tridiag_to_eigv(tridiag_list)
    return eigv_to_density(nodes, weights, grid_len=grid_len, sigma_sq=sigma_sq)


@validated(
    eig_vals=tensor,
    all_weights=or_none(tensor),
    grids=or_none(tensor),
    grid_len=whole_number,
    sigma_sq=or_none(real),
)
def eigv_to_density(
    eig_vals: Tensor,
    all_weights: Tensor | None = None,
    grids: Tensor | None = None,
    grid_len: int = 10000,
    sigma_sq: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the mean over runs of Gaussians at the nodes, with the integral 1 over the grid.

    Args:
        eig_vals: Nodes ``(draws, order)``.
        all_weights: Weights of the nodes; equal by default.
        grids: Equidistant points at which to compute the density; by default ``grid_len`` points
            from 0.01 below the lowest node to 0.01 above the highest one.
        grid_len: Number of points.
        sigma_sq: Variance of a Gaussian, 1e-5 by default, multiplied by the range of the nodes if
            this is above 1.

    Returns:
        ``(density, grids)``, float64.

    Raises:
        ValueError: If nodes are not finite, or if an option is out of range.
    """
    nodes = eig_vals.double()
    if nodes.dim() != 2 or not nodes.isfinite().all():
        raise ValueError("eig_vals must be finite, of shape (draws, order): pass those of a run")
    weights = torch.full_like(nodes, 1 / nodes.shape[1]) if all_weights is None else all_weights
    low, high = float(nodes.min()) - 1e-2, float(nodes.max()) + 1e-2
    if grids is None:
        at_least(2, grid_len=grid_len)
        grids = torch.linspace(low, high, grid_len, dtype=torch.float64, device=nodes.device)
    variance = (1e-5 if sigma_sq is None else sigma_sq) * max(1.0, high - low)
    if not variance > 0:
        raise ValueError(f"sigma_sq={sigma_sq}: it must be positive, such as 1e-5")
    points, runs, shares = (x.double().cpu().numpy() for x in (grids, nodes, weights))
    density = normalised(mixture(points, runs, shares, variance), points)
    return torch.from_numpy(density).to(nodes.device), grids.double()
