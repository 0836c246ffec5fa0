"""Recurrence of block Lanczos: its state, a step, and the restart from the best Ritz vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.eigen.ritz import Which, kept_by_restart, rayleigh_ritz, wanted
from hessfunc.algorithms.offload import is_far, room_beside
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.starts import lengths_of, of_starts
from hessfunc.algorithms.symmetry import SYMMETRIC, refuse_asymmetric
from hessfunc.numerics import rounding
from hessfunc.options import at_least
from hessfunc.spaces.space import Space, available_to, products_eps
from hessfunc.trees import Tree

# With the rounding r of a product below _REACHABLE times the tolerance, the residuals of the
# recurrence must fall to the tolerance minus _SAFETY r.
_SAFETY = 1.25
_REACHABLE = 0.7
# Share of a tolerance below which the error that the recurrence shows by itself needs no product.
_NEGLIGIBLE = 0.1
# Smaller than any residual that matters.
_TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class LanczosOptions:
    """Options of `lanczos`, with the dtype and the device of the basis determined."""

    k: int
    which: Which
    block_size: int
    basis_size: int | None
    basis_dtype: torch.dtype
    basis_device: torch.device
    basis_bytes: int | None
    rtol: float
    atol: float
    search: int
    start: Tree | None

    def __post_init__(self) -> None:
        at_least(0, rtol=self.rtol, atol=self.atol, search=self.search)
        if self.basis_dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"basis_dtype={self.basis_dtype}: choose torch.bfloat16, torch.float32 or "
                "torch.float64"
            )


@dataclass(frozen=True)
class Problem:
    """Options of a run in the space of its vectors.

    Attributes:
        method: Options of the run.
        space: Space of the vectors.
    """

    method: LanczosOptions
    space: Space

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products and combinations."""
        return torch.promote_types(self.method.basis_dtype, torch.float32)

    @cached_property
    def eps(self) -> float:
        """Machine epsilon of the products and of the basis."""
        return products_eps(self.space, self.method.basis_dtype)


@dataclass(frozen=True)
class State:
    """Block Lanczos recurrence ``A V' = V' T + X' C``.

    V are the first rows of the basis; X, the next block, are the rest. The basis lies in a
    workspace that a state shares with its successor. A step writes only behind the basis. A restart
    overwrites the basis, so that only the new state is valid.

    Attributes:
        basis: Orthonormal rows, V above X.
        projected: T, float64 ``(m, m)`` on the CPU.
        coupling: C, float64 ``(b, m)`` on the CPU.
        probes: Number of random vectors drawn so far.
        basis_size: Largest number of basis vectors.
        seed: Seed of the run.
        before: Largest absolute Ritz value before the last restart, which may drop its vector.
        steps: Number of block steps since the last random start.
        closed: Wanted values when V last spanned an invariant subspace.
        finished: Whether nothing remains to be found outside of V.
        trusted: Whether the Krylov space began at a random vector, or one has shown that no wanted
            eigenvalue lies outside of it.
        owed: Number of block steps required from the last random vector, since that many steps
            have shown a wanted eigenvalue outside of the basis.
        certificate: Probability with which a random vector would not have shown a wanted eigenvalue
            outside of the basis, after all pairs had converged; None before there is one.
        failure: Error of the recurrence for a combination of all pairs, measured by a product;
            None before that product.
        noise: Largest measured rounding of a product with a unit vector.
        asymmetry: Error of the recurrence for a unit combination of V, as u'Av - v'Au shows it for
            rows u and v; infinite if the basis is coarser than the products.
        looked: Number of block steps, and largest logarithm of a residual in units of its
            tolerance, when the Ritz pairs were last computed.
        pairs: Wanted pairs with residuals checked by products; None before the end of the run.
    """

    basis: Basis
    projected: Tensor
    coupling: Tensor
    probes: int
    basis_size: int
    seed: int
    before: float = 0.0
    steps: int = 0
    closed: Tensor | None = None
    finished: bool = False
    trusted: bool = True
    owed: int = 0
    certificate: float | None = None
    failure: float | None = None
    noise: float = 0.0
    asymmetry: float = 0.0
    looked: tuple[int, float] = (0, math.inf)
    pairs: Pairs | None = None

    @property
    def size(self) -> int:
        return self.projected.shape[0]

    @property
    def seed_of_starts(self) -> int:
        """Seed of the random vectors."""
        return of_starts(self.seed)

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, ascending, and their coefficients in the basis, as columns."""
        return rayleigh_ritz(self.projected)

    @cached_property
    def largest(self) -> float:
        """Largest absolute Ritz value so far, a lower bound of |A|."""
        return max(self.before, float(self.ritz[0].abs().max())) if self.size else 0.0

    @cached_property
    def longest(self) -> float:
        """Length of the longest row of T: at most `largest`, and cheaper."""
        if not self.size:
            return self.before
        return max(self.before, float(torch.linalg.vector_norm(self.projected, dim=1).max()))


@dataclass(frozen=True)
class Pairs:
    """Wanted Ritz values, their vectors as rows, and residuals."""

    values: Tensor
    rows: Tensor
    residuals: Tensor


def initial(problem: Problem, seed: int) -> State:
    """Return the state before the first block, which contains the given start vectors."""
    method, space, dtype = problem.method, problem.space, problem.dtype
    b, basis_size = method.block_size, size_that_fits(problem)
    trusted = method.start is None or not method.search
    rows = space.probes(range(b), kind="normal", seed=of_starts(seed), dtype=dtype)
    if method.start is not None:
        given = space.rows(method.start, dtype=dtype)
        if len(given) > b:
            # Random combinations of all given vectors, so that none is left out.
            given = space.combine(space.gram(rows, given), given)
        rows = torch.cat([given / lengths_of(space, given).to(dtype)[:, None], rows[len(given) :]])
    empty = Basis.empty(space, method.basis_dtype, method.basis_device)
    block, _, _ = orthonormal(space, rows, empty, threshold=lambda _: 0.0)
    basis = empty.append(block, basis_size + b + (not trusted))
    none = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    coupling = torch.zeros(len(block), 0, dtype=torch.float64, device="cpu")
    coarse = torch.finfo(method.basis_dtype).eps > torch.finfo(dtype).eps
    return State(
        basis,
        none,
        coupling,
        probes=b,
        basis_size=basis_size,
        seed=seed,
        trusted=trusted,
        asymmetry=math.inf if coarse else 0.0,
    )


def size_that_fits(problem: Problem) -> int:
    """Return the number of basis vectors: the requested one, or the largest that fits in memory.

    Raises:
        MemoryError: If the smallest basis does not fit.
    """
    method, space = problem.method, problem.space
    k, b, limit = method.k, method.block_size, method.basis_bytes
    requested = min(space.n, method.basis_size or max(2 * k + 60, k + 4 * b))
    fewest = min(space.n, k + 2 * b)
    if limit is None:
        limit = available_to(space, method.basis_device) // 2
    vector = space.widest * method.basis_dtype.itemsize
    pairs = k * space.widest * problem.dtype.itemsize
    far = is_far(method.basis_device, space.device)
    if far:
        block = b * space.widest * problem.dtype.itemsize
        room_beside(space, method.basis_dtype, block + pairs)
        pairs = 0
    most = (limit - pairs) // max(vector, 1) - b
    if most < fewest:
        raise MemoryError(
            f"a basis of {fewest} vectors of {space.widest} entries takes "
            f"{((fewest + b) * vector + pairs) / 2**30:.2f} GiB"
            f"{'' if far else ' with the pairs'}, and "
            f"{limit / 2**30:.2f} GiB may be used: take fewer pairs, a smaller `block_size`, "
            "`basis_dtype=torch.bfloat16`, `basis_device='cpu'` on a GPU, `power_iteration`, or "
            "more `basis_bytes`"
        )
    return min(requested, most)


def block_step(problem: Problem, products: Products, state: State) -> State:
    """Multiply the next block, and split the products into new columns of T and a new block."""
    space, j, basis = problem.space, state.size, state.basis
    last = basis[j:].brought(space).to(problem.dtype)
    images = products(last)
    # For a symmetric A, V A X' = C'. Only the last block of V is coupled with X, except right after
    # a restart.
    coupled = state.coupling[:, int(state.coupling.any(0).int().argmax()) if j else 0 :]
    own = space.gram(images, last)
    block, factor, inner = orthonormal(
        space,
        images,
        basis,
        threshold=lambda longest: rounding(problem.eps, max(state.longest, longest)),
        predicted=torch.cat([coupled.to(own), own], dim=1),
    )
    # A X' = [V; X]' columns + Q' F with the next block Q, so that columns = [V A X'; X A X'].
    columns = inner.mT
    above, corner = columns[:j], columns[j:]
    # The recurrence gives V A X' = C' for a symmetric A. Right after a restart, T is therefore the
    # arrowhead matrix of Wu and Simon: diag(values), bordered by C and C'.
    difference = above - state.coupling.mT
    # The rounding of a product has no preferred direction. Of its squared length, V shows j / n.
    shown = float(torch.linalg.vector_norm(difference))
    asymmetry = max(math.hypot(state.asymmetry, shown), shown * (space.n / max(j, 1)) ** 0.5)
    # T <- [V; X] A [V; X]', and C <- [0 F]. Between them the two keep A V' = V' T + X' C.
    left = torch.cat([state.projected, above.mT])
    right = torch.cat([above, (corner + corner.mT) / 2])
    following = replace(
        state,
        basis=basis.append(block, workspace(problem, state)),
        projected=torch.cat([left, right], dim=1),
        coupling=torch.cat([factor.new_zeros(len(factor), j), factor], dim=1),
        steps=state.steps + 1,
        failure=None,
        asymmetry=asymmetry,
    )
    # The dtype of the vectors does not show that a model computes in bfloat16. Its products are
    # symmetric only up to SYMMETRIC; with a looser rtol, larger differences must be let through.
    tolerance = max(SYMMETRIC, 10 * problem.eps, 2 * problem.method.rtol)
    largest = float(difference.abs().max()) if j else 0.0
    refuse_asymmetric(largest, following.longest, tolerance)
    return following if len(block) else _fresh_block(problem, following)


def workspace(problem: Problem, state: State) -> int:
    """Return the number of vectors in the workspace: one more if a vector may come from outside."""
    width = len(state.basis) - state.size
    return state.basis_size + max(problem.method.block_size, width) + (not state.trusted)


def _fresh_block(problem: Problem, state: State) -> State:
    """Return the state with a random block outside of the invariant subspace that V spans.

    The run is finished instead if the last such block has changed no wanted value.
    """
    space, (values, _) = problem.space, wanted_ritz(problem, state)
    floor = rounding(problem.eps, state.largest)
    nothing_new = (
        state.closed is not None
        and len(values) == problem.method.k == len(state.closed)
        and bool(((values - state.closed).abs() <= floor).all())
    )
    if nothing_new or state.size == space.n:
        return replace(state, closed=values, finished=True)
    width = min(problem.method.block_size, space.n - state.size)
    indices = range(state.probes, state.probes + width)
    rows = space.probes(indices, kind="sphere", seed=state.seed_of_starts, dtype=problem.dtype)
    block, _, _ = orthonormal(space, rows, state.basis, threshold=lambda _: 1e-3)
    return replace(
        state,
        basis=state.basis.append(block, workspace(problem, state)),
        coupling=torch.zeros(len(block), state.size, dtype=torch.float64, device="cpu"),
        probes=state.probes + width,
        steps=0,
        closed=values,
        finished=len(block) == 0,
    )


def restarted(problem: Problem, state: State) -> State:
    """Shrink the basis to its outer Ritz vectors, in its own memory, and keep the next block.

    With T Y = Y D for the kept Ritz pairs, the recurrence A V' = V' T + X' C turns into

        A (Y'V)' = (Y'V)' D + X' (C Y),

    the restart of Wu and Simon: T becomes the diagonal D, and C becomes C Y.
    """
    values, vectors = state.ritz
    block = state.basis[state.size :].brought(problem.space).clone()
    indices = wanted(problem.method.which, values, problem.method.k)
    unconverged = indices[residuals(problem, state) > 1]
    kept = kept_by_restart(values, indices, unconverged, room=state.basis_size - len(block))
    rotation = vectors[:, kept]
    rotated = state.basis[: state.size].rotate(problem.space, rotation, problem.dtype)
    return replace(
        state,
        basis=rotated.append(block, workspace(problem, state)),
        projected=values[kept].diag(),
        coupling=state.coupling @ rotation,
        before=state.largest,
    )


def residuals(problem: Problem, state: State) -> Tensor:
    """Return the residuals of the wanted Ritz pairs, in units of their tolerances."""
    values, rotation = wanted_ritz(problem, state)
    lengths = torch.linalg.vector_norm(state.coupling @ rotation, dim=0)
    return lengths / tolerances(problem, values, state).clamp_min(_TINY)


def wanted_pairs(problem: Problem, state: State) -> Pairs:
    """Return the wanted pairs, with the residuals of the recurrence.

    For a Ritz vector v = V'y with T y = value y, A v - value v = X' C y has the length |C y|.
    """
    values, rotation = wanted_ritz(problem, state)
    rows = state.basis[: state.size].combine(problem.space, rotation.mT, problem.dtype)
    return Pairs(values, rows, torch.linalg.vector_norm(state.coupling @ rotation, dim=0))


def wanted_ritz(problem: Problem, state: State) -> tuple[Tensor, Tensor]:
    """Return the wanted Ritz values, and their coefficients in the basis, as columns."""
    values, vectors = state.ritz
    indices = wanted(problem.method.which, values, problem.method.k)
    return values[indices], vectors[:, indices]


def tolerances(problem: Problem, values: Tensor, state: State) -> Tensor:
    """Return the residuals of the recurrence at which the run stops, at least eps |A|.

    The rounding of products adds to the residuals, and is subtracted from the tolerance unless it
    is too large.
    """
    tolerance, error = _requested(problem, values, state), _error(problem, state)
    noise = torch.where(error <= _NEGLIGIBLE * tolerance, max(state.noise, error), state.noise)
    below = (tolerance - _SAFETY * noise).clamp_min(problem.eps * state.largest)
    return torch.where(noise < _REACHABLE * tolerance, below, tolerance)


def known_error(problem: Problem, state: State) -> float | None:
    """Return the error of the recurrence for a unit vector if it is known and negligible, or None.

    All inner products of V with its products are computed, so that A V' = V' T + X' C up to the
    rounding of the products and up to the difference of T and V A V'.
    """
    values, rotation = wanted_ritz(problem, state)
    lengths = torch.linalg.vector_norm(state.coupling @ rotation, dim=0)
    error, allowed = _error(problem, state), _requested(problem, values, state)
    negligible = error <= _NEGLIGIBLE * torch.maximum(allowed, lengths)
    return error if bool(negligible.all()) else None


def _error(problem: Problem, state: State) -> float:
    return max(rounding(problem.eps, state.largest), state.asymmetry)


def _requested(problem: Problem, values: Tensor, state: State) -> Tensor:
    least = max(problem.method.atol, problem.eps * state.largest)
    return (problem.method.rtol * values.abs()).clamp_min(least)


def have_converged(problem: Problem, state: State, pairs: Pairs) -> Tensor:
    """Return whether each residual is within the tolerance, or value and residual are rounding."""
    floor, sizes = rounding(problem.eps, state.largest), pairs.values.abs()
    converged = pairs.residuals <= (problem.method.rtol * sizes).clamp_min(problem.method.atol)
    return converged | ((sizes <= floor) & (pairs.residuals <= floor))
