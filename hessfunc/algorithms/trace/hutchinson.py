"""The trace by independent probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Checkpoint, Directory
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.results import Eigenpairs, Estimate, narrow_enough
from hessfunc.algorithms.rounds import Callback, Products, at_least, drive, rows_dtype
from hessfunc.algorithms.samples import FEWEST_SAMPLES, standard_error
from hessfunc.options import validated
from hessfunc.precision import wide_dtype
from hessfunc.trees import Matvec, ProbeKind, Space, Tree

__all__ = ["hutchinson"]


@validated
def hutchinson(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    kind: ProbeKind = "signs",
    deflate: Eigenpairs | None = None,
    known: Tree | None = None,
    block_size: int = 10,
    seed: int | None = None,
    space: Space | None = None,
    callback: Callback[Estimate] | None = None,
    checkpoint: Directory = None,
) -> Estimate:
    """The trace of a matrix, by random probes (Girard-Hutchinson).

        tr A = E[w'Aw],  E[ww'] = I

    estimated by the mean over probes, with a Student interval that is widened for skewness. The
    variance of one probe is 2 (|A|_F^2 - sum_i a_ii^2) for signs, 2 |A|_F^2 for normal probes,
    and 2 n / (n + 2) (|A|_F^2 - tr(A)^2 / n) for the sphere, for a symmetric A. Eigenpairs
    that are at hand need not be sampled:

        tr A = sum_i value_i + E[u'Au],  u = (I - VV') w,

    and neither need a part of the matrix whose diagonal is known, if ``matvec`` leaves it out:

        tr (A + K) = tr K + E[w'Aw].

    Args:
        matvec: block -> block.
        like: a tree that says what vectors look like.
        rtol: stop when the half-width of the 95 % interval is below rtol |value|.
        atol: stop when it is below atol. Without rtol and atol the whole budget is used.
        max_matvecs: the budget: so many probes at the most.
        kind: ``"signs"``, ``"normal"`` or ``"sphere"``.
        deflate: eigenpairs of A, from `lanczos`. Their vectors must be orthonormal; they need not
            have converged.
        known: the diagonal of K, as a tree like one vector; the estimate is then of tr (A + K).
        block_size: how many probes are multiplied at once.
        seed: of the probes.
        space: in which every rank holds a part of each vector, made by `sharded`; by default
            every rank holds the whole.
        callback: called with the running `Estimate` after each round; returning True stops.
        checkpoint: a directory that keeps the state, for a run that was killed to go on from.

    Returns:
        `Estimate`, with the part of each leaf in ``by_leaf`` (those of eigenpairs up to their
        residuals), and ``squared_frobenius`` from the same products, where no part is known.

    Raises:
        ValueError: an option is out of range; the eigenpairs are of other parameters.
        FloatingPointError: a product is not finite.

    Cost: one matvec a probe; those of the eigenpairs are not counted again.

    Source: Girard 1989; Hutchinson 1990; the interval: Johnson 1978.
    """
    products = Products.of(matvec, like, space)
    space = products.space
    at_least(0, rtol=rtol, atol=atol)
    at_least(2, max_matvecs=max_matvecs)
    at_least(1, block_size=block_size)
    store = Checkpoint.of(
        checkpoint,
        "hutchinson",
        products,
        seed,
        block_size=block_size,
        kind=kind,
        deflate=None if deflate is None else (deflate.values, space.rows(deflate.vectors)),
    )
    seed = store.seed
    outside = 0.0 if known is None else _sums(space, known)
    pairs = _spanned(space, deflate)

    def step(state: _State, room: int) -> _State:
        first = len(state.parts)
        indices = range(first, first + min(room, block_size))
        probes = space.probes(indices, kind=kind, seed=seed, dtype=rows_dtype(space))
        probes = pairs.complement(space, probes, on_sphere=kind == "sphere")
        images = products(probes)
        parts = space.by_leaf(probes, images).cpu().double()
        squares = space.norms(images).cpu().double().square()
        return _State(torch.cat([state.parts, parts]), torch.cat([state.squares, squares]))

    def found(state: _State, reason: str) -> Estimate:
        exact = pairs.parts + outside
        samples = exact.sum() + state.parts.sum(1)
        parts = exact + state.parts.mean(0)
        return Estimate(
            value=float(samples.mean()),
            stderr=standard_error(samples),
            degrees=len(samples) - 1,
            samples=samples,
            by_leaf=dict(zip(space.names, parts.tolist(), strict=True)),
            squared_frobenius=None
            if known is not None
            else squared_frobenius(pairs.squares + state.squares, products, seed),
            **products.cost(reason, seed),
        )

    def verdict(state: _State) -> str | None:
        if len(state.parts) < FEWEST_SAMPLES or (rtol is None and atol is None):
            return None
        return narrow_enough(found(state, "running"), rtol, atol)

    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    state, reason = drive(
        _State(none.new_zeros(0, len(space.names)), none),
        products=products,
        step=step,
        verdict=verdict,
        running=lambda state: found(state, "running"),
        max_matvecs=max_matvecs,
        callback=callback,
        storage=store,
    )
    return found(state, reason)


@dataclass(frozen=True)
class _State:
    """The samples so far: ``w'Aw`` leaf by leaf, ``(p, leaves)``, and ``|Aw|^2``; float64."""

    parts: Tensor
    squares: Tensor


@dataclass(frozen=True)
class _Spanned:
    """What eigenpairs tell: orthonormal rows, the trace of each leaf and ``|AV|_F^2``."""

    basis: Tensor
    parts: Tensor
    squares: float

    def complement(self, space: Space, probes: Tensor, *, on_sphere: bool) -> Tensor:
        """The probes outside of the basis; back on the sphere of that complement if need be."""
        if not len(self.basis):
            return probes
        outer = probes
        for _ in range(2):
            outer = outer - space.combine(space.gram(outer, self.basis), self.basis)
        if on_sphere:
            radius = (space.n - len(self.basis)) ** 0.5
            outer = outer * (radius / space.norms(outer)).to(outer.dtype)[:, None]
        return outer


def _sums(space: Space, vector: Tree) -> Tensor:
    """Of the entries of each leaf."""
    wide = wide_dtype(space.device)
    sums = torch.stack([leaf.sum(dtype=wide).cpu().double() for leaf in space.tree_leaves(vector)])
    if not bool(sums.isfinite().all()):
        raise ValueError("known has entries that are NaN or infinite")
    return sums


def _spanned(space: Space, pairs: Eigenpairs | None) -> _Spanned:
    if pairs is None:
        none = space.zeros(0, rows_dtype(space))
        return _Spanned(none, torch.zeros(len(space.names), dtype=torch.float64, device="cpu"), 0.0)
    basis = space.rows(pairs.vectors, dtype=rows_dtype(space))
    if len(basis) >= space.n:
        raise ValueError("all eigenpairs are at hand: the trace is the sum of their values")
    values = pairs.values.cpu().double()
    return _Spanned(
        basis,
        (values[:, None] * space.by_leaf(basis, basis).cpu().double()).sum(0),
        float(values.square().sum() + pairs.residuals.square().sum()),
    )
