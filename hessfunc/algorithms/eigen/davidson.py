"""Davidson methods for pairs near a shift, and for the generalised problem A v = value B v."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hessfunc.algorithms.driver import Method
from hessfunc.algorithms.eigen.pencil import Pencil
from hessfunc.algorithms.eigen.ritz import Which, have_converged, kept_by_restart, wanted
from hessfunc.algorithms.eigen.subspace import RitzPairs, Subspace
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.starts import lengths_of, of_starts
from hessfunc.algorithms.symmetry import SYMMETRIC
from hessfunc.numerics import rounding
from hessfunc.options import at_least
from hessfunc.spaces.space import DIVIDED, Rows, Space, available_to, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of pairs beside the k nearest ones whose residuals are computed, because a Ritz value near
# the shift may belong to no eigenvalue.
_BESIDE = 4
# Residual of a correction, relative to that of its pair: a looser one takes more outer products, a
# tighter one solves for more digits than the next correction needs.
_CORRECTED = 0.1
# Residual of a solution for a random vector, relative to the part of one eigenvector in it.
_DRAWN = 0.3
# Distance of the shift for a random vector from sigma, relative to that of the k-th pair.
_OFF = 0.1
# Number of inverse iterations from a random vector that must not change the pairs.
_SEARCHES = 3
# Residual of the pair behind the k nearest ones, relative to its distance from the shift.
_OF_GUARD = 0.25


@dataclass(frozen=True)
class _State:
    """Span of B-orthonormal rows, the wanted Ritz pairs in it, and the next rows.

    Attributes:
        span: Span of the rows so far.
        following: Rows that the next round multiplies, B-orthonormal with the span.
        following_duals: Products of these rows with B.
        values: Wanted Ritz values.
        vectors: Wanted Ritz vectors, as rows.
        residuals: Residual of each wanted pair in the norm of B^-1.
        target: Index of the first pair that has not converged.
        ratio: Length of a residual in the norm of B^-1 relative to its 2-norm; None before the
            first product with B^-1.
        measured: Whether the residuals are those of products with B^-1, and not estimates.
        largest: Largest absolute Ritz value so far.
        seed: Seed of the run.
        inner: Number of products with B, and of products with A in corrections.
        searched: Wanted values when random vectors began to search for nearer ones.
        searches: Number of these random vectors.
        probes: Number of random vectors drawn so far.
    """

    span: Subspace
    following: Rows = field(metadata=DIVIDED)
    following_duals: Rows = field(metadata=DIVIDED)
    values: Tensor
    vectors: Rows = field(metadata=DIVIDED)
    residuals: Tensor
    target: int = 0
    ratio: float | None = None
    measured: bool = False
    largest: float = 0.0
    seed: int = 0
    inner: int = 0
    searched: Tensor | None = None
    searches: int = 0
    probes: int = 0


@dataclass(frozen=True, kw_only=True)
class Davidson(Method[_State, Eigenpairs]):
    """Rayleigh-Ritz in a span that grows by a correction of the first unconverged pair.

    For a residual r = A v - value B v at an end of the spectrum, the correction is B^-1 r by
    conjugate gradients, and the span is a Krylov space of B^-1 A. Near a shift it is the t with

        P'(A - shift B)P t = r,  P = I - Q'Q B,

    by minimal residuals, where Q are the pair and the converged ones. The shift is ``sigma``, and
    the Ritz value once the interval of the pair excludes sigma. The products with all basis vectors
    are kept, so that the error of a correction costs steps, but no accuracy.

    The span for a shift begins at solutions of (A - sigma B) x = b for k + 1 random b, in which the
    nearest eigenvectors dominate. The pair behind the k nearest ones, the guard, is computed to one
    digit. After all have converged, the solution for one more random vector, apart from the k
    pairs, must not change them.

    Attributes:
        k: Number of pairs.
        which: Wanted end of the spectrum, or ``"nearest"``.
        sigma: Number to which the wanted eigenvalues are nearest; None for an end.
        metric: Matvec of B, or None for the identity.
        basis_size: Largest number of basis vectors, or None for the default.
        rtol: Relative tolerance of the residuals.
        atol: Absolute tolerance of the residuals.
        start: Start vectors, or None for random ones.

    Source: Davidson 1975; Sleijpen and van der Vorst 1996, A Jacobi-Davidson iteration method for
    linear eigenvalue problems; restart: Stathopoulos, Saad and Wu 1998.
    """

    k: int
    which: Which
    sigma: float | None
    metric: Matvec | None
    basis_size: int | None
    rtol: float
    atol: float
    start: Tree | None

    changeable: ClassVar = frozenset({"rtol", "atol", "metric"})

    def __post_init__(self) -> None:
        at_least(0, rtol=self.rtol, atol=self.atol)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "generalised": self.metric is not None}

    def init(self, products: Products, seed: int, /) -> _State:
        space, dtype = products.space, rows_dtype(products.space)
        rows = self._drawn(space, seed, range(self._width(space)))
        if self.start is not None:
            given = space.rows(self.start, dtype=dtype)
            lengths_of(space, given)
            rows = torch.cat([given, rows])[: max(len(rows), len(given))]
        no_numbers = torch.zeros(0, dtype=torch.float64, device="cpu")
        return _State(
            span=Subspace.empty(space, has_metric=self.metric is not None),
            following=rows,
            following_duals=rows[:0],
            values=no_numbers,
            vectors=rows[:0],
            residuals=no_numbers,
            seed=seed,
            probes=self._width(space),
        )

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, pencil, begun = products.space, self._pencil(products), products.matvecs
        if not len(state.span):
            state = self._opened(state, pencil, room)
        if products.matvecs + len(state.following) > begun + room:
            return state
        outer = len(state.following)
        state = self._extended(state, space, products(state.following))
        pairs = self._pairs(state, space)
        state = replace(state, values=pairs.values, vectors=pairs.vectors)
        state, direction = self._examined(state, pairs, pencil, room - (products.matvecs - begun))
        if not self._is_done(state, space):
            # One product is reserved for the correction, and one for its product with B.
            left = room - (products.matvecs - begun) - 1 - (self.metric is not None)
            if self.sigma is not None and left > 0:
                state, direction = self._corrected(state, pairs, pencil, left)
            state = self._restarted(state, space)
            span = state.span
            following, duals = pencil.orthonormal(direction, span.basis.rows, span.duals.rows)
            state = replace(state, following=following, following_duals=duals)
        return replace(state, inner=state.inner + products.matvecs - begun - outer)

    def _width(self, space: Space) -> int:
        """Return the number of computed pairs: k, and one more near a shift."""
        return min(space.n, self.k + (self.sigma is not None))

    def _drawn(self, space: Space, seed: int, indices: range) -> Tensor:
        seed, dtype = of_starts(seed), rows_dtype(space)
        return space.probes(indices, kind="normal", seed=seed, dtype=dtype)

    def _opened(self, state: _State, pencil: Pencil, room: int) -> _State:
        """Return the state whose next rows are B-orthonormal, and near a shift solutions."""
        rows, none = state.following, state.span.basis.rows
        left = room - len(rows) * (1 + (self.metric is not None))
        if self.sigma is not None and left > 0 and len(rows) < pencil.space.n:
            solved = pencil.solved(
                rows, self.sigma, none, none, rtol=_DRAWN / pencil.space.n**0.5, room=left
            )
            rows = torch.where((pencil.space.norms(solved) > 0)[:, None], solved, rows)
        following, duals = pencil.orthonormal(rows, none, none)
        return replace(state, following=following, following_duals=duals)

    def _pencil(self, products: Products) -> Pencil:
        metric = None if self.metric is None else Products(self.metric, products.space)
        return Pencil(products, metric)

    def _extended(self, state: _State, space: Space, images: Tensor) -> _State:
        """Return the state with the next rows in the span."""
        rows = state.following
        span = state.span.extended(
            space,
            rows,
            images,
            state.following_duals,
            size=self._size(space),
            tolerance=max(SYMMETRIC, 10 * products_eps(space), 2 * self.rtol),
        )
        return replace(state, span=span, following=rows[:0], following_duals=rows[:0])

    def _pairs(self, state: _State, space: Space) -> RitzPairs:
        """Return the wanted Ritz pairs in the span."""
        values, _ = state.span.ritz
        if self.sigma is None:
            return state.span.pairs(space, wanted(self.which, values, self.k))
        near = (values - self.sigma).abs().argsort()[: self.k + _BESIDE]
        pairs = state.span.pairs(space, near)
        # |(A - sigma B) v| / |B v| is small only if an eigenvalue is near, unlike the distance of a
        # Ritz value, which may be small by chance.
        sizes = pairs.lengths / space.norms(pairs.duals).cpu().double()
        distances = torch.hypot(pairs.values - self.sigma, sizes)
        return pairs.at(distances.argsort()[: self._width(space)])

    def _examined(
        self, state: _State, pairs: RitzPairs, pencil: Pencil, room: int
    ) -> tuple[_State, Tensor]:
        """Return the state with residuals in the norm of B^-1, and the target's B^-1 r.

        The residuals of all pairs in a Krylov space are parallel. Therefore one of them shows the
        lengths of all, until all seem to have converged and each is measured.
        """
        space = pencil.space
        if self.sigma is None and self.metric is not None and state.ratio is not None:
            state = self._with(state, space, pairs.lengths * state.ratio, measured=False)
            if not self._is_short(state, space).all():
                outside = pairs.outside[state.target][None]
                inverse, _ = pencil.inverted(outside, room)
                square = max(float(space.gram(outside, inverse)), 0.0)
                ratio = square**0.5 / float(pairs.lengths[state.target])
                state = replace(state, ratio=ratio, residuals=pairs.lengths * ratio)
                return state, inverse
        inverses, accurate = pencil.inverted(pairs.outside, room)
        if self.metric is None:
            residuals = pairs.lengths
        else:
            squares = space.gram(pairs.outside, inverses).diagonal().cpu().double()
            residuals = squares.clamp_min(0).sqrt()
        state = self._with(state, space, residuals, measured=accurate)
        length = float(pairs.lengths[state.target])
        ratio = float(residuals[state.target]) / length if length else None
        return replace(state, ratio=ratio), inverses[state.target][None]

    def _with(self, state: _State, space: Space, residuals: Tensor, *, measured: bool) -> _State:
        state = replace(state, residuals=residuals, measured=measured)
        state = replace(state, largest=max(state.largest, float(state.values.abs().max())))
        return replace(state, target=int((~self._is_short(state, space)).long().argmax()))

    def _corrected(
        self, state: _State, pairs: RitzPairs, pencil: Pencil, room: int
    ) -> tuple[_State, Tensor]:
        """Return the correction of the target, or a solution for a random vector if all are short.

        The residual itself is the correction if minimal residuals make no step.
        """
        assert self.sigma is not None
        space, short = pencil.space, self._is_short(state, pencil.space)
        if state.measured and short.all():
            known, duals = pairs.vectors[: self.k], pairs.duals[: self.k]
            # At an eigenvalue the matrix would be singular, and the solution without its vector.
            shift = self.sigma + _OFF * float((state.values[: self.k] - self.sigma).abs().max())
            if self._is_unchanged(state, space):
                state = replace(state, searches=state.searches + 1)
                row, rtol = state.span.basis.rows[-1:], _CORRECTED
            else:
                row = self._drawn(space, state.seed, range(state.probes, state.probes + 1))
                state = replace(state, searched=state.values, searches=1, probes=state.probes + 1)
                rtol = _DRAWN / space.n**0.5
        else:
            target = state.target
            rows = [*torch.nonzero(short).flatten().tolist(), target]
            value, residual = float(state.values[target]), float(state.residuals[target])
            shift = value if residual < abs(value - self.sigma) else self.sigma
            row, rtol = pairs.outside[target][None], _CORRECTED
            known, duals = pairs.vectors[rows], pairs.duals[rows]
        solved = pencil.solved(row, shift, known, duals, rtol=rtol, room=room)
        return state, solved if bool(space.norms(solved) > 0) else row

    def _restarted(self, state: _State, space: Space) -> _State:
        """Return the state with the span of the best Ritz vectors if the basis is full."""
        size, (values, _) = self._size(space), state.span.ritz
        if len(state.span) < size:
            return state
        if self.sigma is None:
            indices = wanted(self.which, values, self.k)
            unconverged = indices[~self._is_short(state, space)]
            kept = kept_by_restart(values, indices, unconverged, room=size - 1)
        else:
            kept = (values - self.sigma).abs().argsort()[: self.k + (size - self.k) // 2]
        return replace(state, span=state.span.restarted(space, kept))

    def _size(self, space: Space) -> int:
        """Return the largest number of basis vectors, each with one or two products."""
        fewest = min(space.n, self.k + 2)
        requested = min(space.n, max(self.basis_size or 2 * self.k + 60, fewest))
        vectors = (2 if self.metric is None else 3) * space.widest * rows_dtype(space).itemsize
        most = available_to(space) // 2 // max(vectors, 1)
        if most < fewest:
            raise MemoryError(
                f"a basis of {fewest} vectors of {space.widest} entries with their products takes "
                f"{fewest * vectors / 2**30:.2f} GiB, more than half of the available memory: take "
                "fewer pairs"
            )
        return min(requested, most)

    def _is_short(self, state: _State, space: Space) -> Tensor:
        """Return whether each residual is within the tolerance, or is rounding."""
        floor = rounding(products_eps(space), state.largest)
        tolerances = (self.rtol * state.values.abs()).clamp_min(max(self.atol, floor))
        if self.sigma is not None and len(tolerances) > self.k:
            distances = _OF_GUARD * (state.values[self.k :] - self.sigma).abs()
            tolerances[self.k :] = tolerances[self.k :].maximum(distances)
        return state.residuals <= tolerances

    def _converged(self, state: _State, space: Space) -> Tensor:
        floor = rounding(products_eps(space), state.largest)
        converged = have_converged(
            state.values, state.residuals, rtol=self.rtol, atol=self.atol, floor=floor
        )
        return converged[: self.k] & state.measured

    def _is_done(self, state: _State, space: Space) -> bool:
        if not (state.measured and bool(self._is_short(state, space).all())):
            return False
        if self.sigma is None or len(state.span) == space.n:
            return True
        return state.searches >= _SEARCHES and self._is_unchanged(state, space)

    def _is_unchanged(self, state: _State, space: Space) -> bool:
        """Return whether the pairs are those before the last random vectors."""
        if state.searched is None:
            return False
        before, now = (values[: self.k].sort().values for values in (state.searched, state.values))
        floor = max(self.atol, rounding(products_eps(space), state.largest))
        return bool(((now - before).abs() <= 2 * (self.rtol * now.abs()).clamp_min(floor)).all())

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        if not len(state.values):
            return None
        if self._is_done(state, products.space):
            missing = int((~self._converged(state, products.space)).sum())
            if missing:
                return (
                    f"the residuals of {missing} pairs cannot reach the tolerance: they are the "
                    "rounding of the products; take a looser rtol, or float64"
                )
            return "converged: all residuals are within the tolerance"
        if not len(state.following):
            return "the residuals lie in the basis up to rounding: take a looser rtol, or float64"
        return None

    def finish(
        self, state: _State, products: Products, reason: str, room: int, /
    ) -> tuple[_State, str]:
        """State the number of inner products, and whether residuals are estimates."""
        if not state.measured:
            reason += ", before products with B^-1 could measure the residuals"
        if state.inner:
            reason += f"; {state.inner} of the {products.matvecs} products were inner ones"
        return state, reason

    def result(self, state: _State, space: Space, cost: Cost, /) -> Eigenpairs:
        order = torch.arange(min(self.k, len(state.values)), device="cpu")
        if self.sigma is not None:
            order = (state.values[: self.k] - self.sigma).abs().argsort()
        return Eigenpairs(
            values=state.values[order],
            vectors=space.vectors(state.vectors[order.to(space.device)]),
            residuals=state.residuals[order],
            converged=self._converged(state, space)[order],
            largest=state.largest,
            **cost,
        )
