"""The trace by exchangeable leave-one-out low-rank approximations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.results import Estimate, narrow_enough
from hessfunc.algorithms.rounds import Callback, Products, at_least, drawn, drive, rows_dtype
from hessfunc.memory import available_memory
from hessfunc.trees import Matvec, Space, Tree

__all__ = ["xtrace"]

# The leave-one-out estimates share their probes and are correlated: the jackknife standard error
# is too small by a factor that was 1.0 to 1.7 on spectra that decay or jump, at 30 to 120 products.
_WIDENING = 1.7
_FEWEST_PROBES = 10


def xtrace(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    block_size: int = 10,
    seed: int | None = None,
    callback: Callback[Estimate] | None = None,
) -> Estimate:
    """The trace of a symmetric matrix, positive or not, by XTrace.

    With probes w_i on the sphere of radius sqrt(n), and Q_i an orthonormal basis of the span of
    A w_j for all j but i,

        t_i = tr(Q_i' A Q_i) + c_i u_i' A u_i,  u_i = (I - Q_i Q_i') w_i,

    where c_i = (n - p + 1) / |u_i|^2 puts u_i back on its sphere. The estimate is the mean of
    t_i. The variance is far below Hutchinson's where the spectrum decays, and zero from rank + 1
    probes on.

    Args:
        matvec: block -> block, symmetric.
        like: a tree that says what vectors look like.
        rtol: stop when the half-width of the 95 % interval is below rtol |value|.
        atol: stop when it is below atol. Without rtol and atol the whole budget is used.
        max_matvecs: the budget, two a probe.
        block_size: how many vectors are multiplied at once.
        seed: of the probes.
        callback: called with the running `Estimate` after each round; returning True stops.

    Returns:
        `Estimate`. ``samples`` are the t_i; ``stderr`` is their jackknife standard error widened
        by 1.7, since they are correlated. That is still too narrow where there are just as many
        probes as equal dominant eigenvalues; a few probes more or less and it holds.

    Raises:
        ValueError: an option is out of range.
        MemoryError: not even two probes fit in memory.
        FloatingPointError: a product is not finite.

    Cost: two matvecs a probe; the memory of 4 vectors a probe.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825.
    """
    products = Products.of(matvec, like)
    space = products.space
    at_least(0, rtol=rtol, atol=atol)
    at_least(4, max_matvecs=max_matvecs)
    at_least(1, block_size=block_size)
    seed = drawn(seed)
    most = _probes_that_fit(space)

    def step(state: _State, room: int) -> _State:
        width = min(block_size, room // 2, min(space.n, most) - len(state.probes))
        return _with_probes(space, products, state, width, seed) if width > 0 else state

    def found(state: _State, reason: str) -> Estimate:
        parts = _leave_one_out(space, state)
        samples = parts.sum(1)
        p = len(samples)
        spread = float(samples.std()) if p > 1 else float("inf")
        rounding = 10 * torch.finfo(state.probes.dtype).eps * float(parts.abs().sum(1).mean())
        return Estimate(
            value=float(samples.mean()),
            stderr=_WIDENING * spread / p**0.5 + rounding,
            samples=samples,
            by_leaf=dict(zip(space.names, parts.mean(0).tolist(), strict=True)),
            matvecs=products.matvecs,
            passes=products.passes,
            reason=reason,
            seed=seed,
        )

    def verdict(state: _State) -> str | None:
        if len(state.probes) == space.n:
            return "converged: the probes span the whole space"
        if len(state.probes) >= most:
            return f"no more than {most} probes fit in memory: `hutchinson` keeps none"
        if len(state.probes) < _FEWEST_PROBES or (rtol is None and atol is None):
            return None
        return narrow_enough(found(state, "running"), rtol, atol)

    none = torch.zeros(0, space.n, dtype=rows_dtype(space), device=space.device)
    state, reason = drive(
        _State(none, none, none, none, torch.zeros(0, 0, dtype=torch.float64)),
        products=products,
        step=step,
        verdict=verdict,
        running=lambda state: found(state, "running"),
        max_matvecs=max_matvecs,
        callback=callback,
    )
    return found(state, reason)


@dataclass(frozen=True)
class _State:
    """Rows: probes W and products AW, an orthonormal basis Q of these, and products AQ.

    ``factor`` holds C of ``AW = C' Q``, float64 on the CPU. Where it has fewer rows than columns
    the products depend on each other: A has lower rank than there are probes.
    """

    probes: Tensor
    images: Tensor
    basis: Tensor
    basis_images: Tensor
    factor: Tensor


def _probes_that_fit(space: Space) -> int:
    """How many probes may be kept, for them to take at most half of the memory."""
    free = available_memory(space.device)
    most = free // 2 // (4 * space.n * rows_dtype(space).itemsize)
    if most < 2:
        raise MemoryError(
            f"two probes of {space.n} entries, with their products, do not fit in "
            f"{free / 2**30:.1f} GiB: take `hutchinson`, which keeps none"
        )
    return most


def _with_probes(space: Space, products: Products, state: _State, width: int, seed: int) -> _State:
    p = len(state.probes)
    dtype = state.probes.dtype
    probes = space.probes(range(p, p + width), kind="sphere", seed=seed, dtype=dtype)
    images = products(probes)
    all_images = torch.cat([state.images, images])

    rest, inner = images, torch.zeros(width, len(state.basis), dtype=torch.float64)
    for _ in range(2):
        share = space.gram(rest, state.basis)
        rest = rest - space.combine(share, state.basis)
        inner += share.cpu().double()
    added, triangle = torch.linalg.qr(rest.mT)
    longest = float(space.norms(all_images).max())
    kept = triangle.diagonal().abs() > 100 * torch.finfo(dtype).eps * longest
    added = added.mT[kept]
    # What is short after the projection is not quite orthogonal to the basis: project once more.
    added = added - space.combine(space.gram(added, state.basis), state.basis)

    old, new = len(state.basis), len(added)
    factor = torch.zeros(old + new, p + width, dtype=torch.float64)
    factor[:old, :p] = state.factor
    factor[:old, p:] = inner.mT
    factor[old:, p:] = triangle[kept].cpu().double()
    return _State(
        probes=torch.cat([state.probes, probes]),
        images=all_images,
        basis=torch.cat([state.basis, added]),
        basis_images=torch.cat([state.basis_images, products(added)])
        if new
        else state.basis_images,
        factor=factor,
    )


def _leave_one_out(space: Space, state: _State) -> Tensor:
    """The estimates t_i, leaf by leaf: float64 ``(p, leaves)``."""
    basis, basis_images = state.basis, state.basis_images
    rank, p = state.factor.shape
    inside = space.gram(basis, state.probes).cpu().double()
    if rank == p:
        # Q_i is orthogonal to one direction Q s_i of Q: the i-th row of the inverse of C.
        left_out = torch.linalg.inv(state.factor).mT
        left_out = left_out / left_out.norm(dim=0)
    else:
        # Any p - 1 of the products still span all of Q.
        left_out = torch.zeros(rank, p, dtype=torch.float64)
    inside = inside - left_out * (left_out * inside).sum(0)
    outer = state.probes - space.combine(inside.mT, basis)
    outer_images = state.images - space.combine(inside.mT, basis_images)
    dimension = space.n - (rank - 1 if rank == p else rank)
    rescaling = dimension / space.norms(outer).cpu().double().square()
    missing = space.combine(left_out.mT, basis)
    missing_images = space.combine(left_out.mT, basis_images)
    whole = space.by_leaf(basis, basis_images).sum(0)
    return (
        whole.cpu().double()
        - space.by_leaf(missing, missing_images).cpu().double()
        + rescaling[:, None] * space.by_leaf(outer, outer_images).cpu().double()
    )
