"""Thick-restart Lanczos with full reorthogonalisation."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.driver import Method, RunOptions, run_method
from hessfunc.algorithms.offload import home, is_far, room_beside
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.starts import of_starts
from hessfunc.algorithms.symmetry import SYMMETRIC, refuse_asymmetric
from hessfunc.numerics import rounding
from hessfunc.options import at_least, validated
from hessfunc.randomness import uniforms
from hessfunc.spaces.space import Space, available_to, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

Which = Literal["LM", "LA", "SA", "BE"]

# Share by which the basis grows in a round: the Ritz values after each round cost m^3 flops.
_GROWTH_A_ROUND = 1 / 16
# With the rounding r of a product below _REACHABLE times the tolerance, the residuals of the
# recurrence must fall to the tolerance minus _SAFETY r.
_SAFETY = 1.25
_REACHABLE = 0.7
# The 1 % quantile of chi2_1.
_UNLIKELY = 1.57e-4
# More than n / _UNLIKELY for any n.
_PLENTY = 1e40
# Smaller than any scale of a matrix.
_TINY = 1e-300
# Probes have the keys (seed, index, leaf) with no negative index, so this key is free.
_KEY_OF_MIXTURE = -1
# Frames between a warning and the caller of `lanczos`.
_CALLER = 5
# Number of steps from a fresh vector outside of an invariant subspace that must find no better
# value.
_STEPS_TO_TRUST = 8


@validated
def lanczos(
    matvec: Matvec,
    like: Tree,
    *,
    k: int = 6,
    which: Which = "LM",
    block_size: int = 1,
    basis_size: int | None = None,
    basis_bytes: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_matvecs: int = 1000,
    search: int = 8,
    start: Tree | None = None,
    **run: Unpack[RunOptions],
) -> Eigenpairs:
    """Compute a few extreme eigenpairs of a symmetric matrix by thick-restart Lanczos.

    The rows V are an orthonormal basis of a Krylov space. The Ritz pairs, which are the eigenpairs
    of T = V A V', approximate the extreme eigenpairs of A. A full basis is restarted from its best
    Ritz vectors. A pair has converged when

        |A v - value v| <= max(rtol |value|, atol).

    At the end, one product with a random combination of all pairs checks the residuals. If it
    deviates by more than rounding, k products measure each residual. A value that is zero up to
    rounding has converged when its residual is zero up to rounding. If the rounding of the
    products, a few eps |A|, hides the tolerance, pairs are not reported as converged, and the
    reason says so.

    A Krylov space of blocks of b vectors holds at most b copies of a repeated eigenvalue. If
    b < k, a few more steps begin at a fresh vector outside of the basis. If they meet an eigenvalue
    that should be among the k, the run warns, and the reason says so. If they meet none, this is
    no proof that nothing was missed.

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric. The block is a view of the basis, which restarts overwrite. A matvec that
            keeps the block must clone it.
        like: Tree that shows the structure of a vector.
        k: Number of pairs, at most n.
        which: Wanted eigenvalues. ``"LM"`` takes the largest in absolute value, in that order,
            ``"LA"`` the largest, descending, and ``"SA"`` the smallest, ascending. ``"BE"`` takes
            k/2 from each end, descending, with one more from the top if k is odd.
        block_size: Number of vectors that are multiplied at once. Only blocks of at least b vectors
            are sure to find all copies of an eigenvalue of multiplicity b.
        basis_size: Largest number of basis vectors, at least k + 2 block_size. The default is the
            larger of 2 k + 10 and k + 4 block_size.
        basis_bytes: Largest memory of the basis, the next block and the pairs, in bytes. The
            default is half of the available memory. The limit lowers ``basis_size`` if necessary.
            With ``basis_device`` it is a limit for that device and excludes the pairs. Set it if
            several ranks keep their bases in the memory of one host.
        basis_dtype: Dtype of the basis, by default that of the vectors, but at least float32.
            ``torch.bfloat16`` takes half of the memory of float32. Products are still computed and
            combined in float32, but basis entries are rounded to 2^-9 of their size, and residuals
            do not fall far below 2e-3 |A|. Use ``rtol=0.01`` or more. If the rounding is visible in
            the final check, k more products measure the residuals. Values are off by up to 2^-9.
        basis_device: Device of the basis, by default that of the vectors. ``"cpu"`` keeps the basis
            of a GPU's vectors in page-locked host memory and copies it to the GPU in pieces, the
            next one while the current one is in use. The GPU then holds two pieces, of 128 MiB or
            of one vector, besides the block and the pairs. The results are those of a basis on the
            GPU up to rounding. A resumed run may use another device.
        rtol: Relative tolerance: the run stops when each residual is at most
            max(rtol |value|, atol).
        atol: Absolute tolerance of the residuals, in units of the eigenvalues.
        max_matvecs: Budget, the largest number of matvecs, including the final check.
        search: Largest number of steps from a fresh vector outside of the basis. With 0 there are
            none, and a given start is trusted.
        start: Start vector as a tree, or a block of vectors, for example those of an earlier run.
            If the block has more than ``block_size`` vectors, they are mixed. The default is
            random. A given start may lie in an invariant subspace. Lanczos steps from a random
            vector outside of the basis therefore follow, at one product each, until they would
            have met a wanted eigenvalue there.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Eigenpairs`. If not all k pairs have converged, ``converged`` and ``reason`` say so.

    Raises:
        ValueError: If an option is out of range, or if the matvec is not symmetric.
        MemoryError: If a basis of k + 2 block_size vectors does not fit in memory, or if the pieces
            of a basis on another device do not.
        FloatingPointError: If a product is not finite.

    Cost: one matvec a basis vector, and one at the end; 2 to ``search`` more if block_size < k. A
    given start costs about the matvecs of a few more pairs, to show that nothing was missed.
    Reorthogonalisation takes 4 basis_size n flops a matvec, twice. Memory: (basis_size +
    block_size + k) n numbers besides those of a product, and 4 search n more if block_size < k.
    With a basis of m vectors on another device, a block step copies it twice, once for each
    projection: 2 m n numbers. A restart moves up to 4 m n.

    Source: Wu and Simon 2000, Thick-restart Lanczos method; block form: Chen, Epperly, Meyer,
    Musco and Rao 2025, arXiv 2508.06486.
    """
    products = Products.of(matvec, like, run.get("space"))
    space = products.space
    if not 1 <= k <= space.n:
        raise ValueError(f"k={k}: the matrix has {space.n} eigenvalues, choose 1 to {space.n}")
    at_least(1, block_size=block_size, basis_bytes=basis_bytes)
    block_size = min(block_size, space.n)
    at_least(max(k, block_size) + 1, max_matvecs=max_matvecs)
    at_least(min(space.n, k + 2 * block_size), basis_size=basis_size)
    method = Lanczos(
        k=k,
        which=which,
        block_size=block_size,
        basis_size=basis_size,
        basis_dtype=basis_dtype or rows_dtype(space),
        basis_device=home(space, basis_device),
        basis_bytes=basis_bytes,
        rtol=rtol,
        atol=atol,
        search=search,
        start=start,
    )
    # The last product is reserved for the check of the pairs.
    return run_method(method, products, run, max_matvecs=max_matvecs, kept=1)


@dataclass(frozen=True, kw_only=True)
class Lanczos(Method["_State", Eigenpairs]):
    """Thick-restart Lanczos; the options are those of `lanczos`."""

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

    changeable: ClassVar = frozenset({"basis_device", "basis_bytes", "rtol", "atol", "search"})

    def __post_init__(self) -> None:
        if self.which not in ("LM", "LA", "SA", "BE"):
            raise ValueError(f"which={self.which!r}: choose 'LM', 'LA', 'SA' or 'BE'")
        at_least(0, rtol=self.rtol, atol=self.atol, search=self.search)
        if self.basis_dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"basis_dtype={self.basis_dtype}: choose torch.bfloat16, torch.float32 or "
                "torch.float64"
            )

    def options(self) -> dict[str, Any]:
        return {**super().options(), "basis_dtype": str(self.basis_dtype)}

    def _problem(self, space: Space, seed: int) -> _Problem:
        return _Problem(
            self.k,
            self.which,
            self.block_size,
            self.rtol,
            self.atol,
            of_starts(seed),
            products_eps(space, self.basis_dtype),
            self.basis_dtype,
            self.basis_device,
        )

    def init(self, products: Products, seed: int, /) -> _State:
        space, problem = products.space, self._problem(products.space, seed)
        wanted = self.basis_size or max(2 * self.k + 10, self.k + 4 * self.block_size)
        size = _size_that_fits(problem, space, min(space.n, wanted), self.basis_bytes)
        trusted = self.start is None or not self.search
        return _start(problem, space, self.start, size, seed, trusted=trusted)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        problem = self._problem(products.space, state.seed)
        return _round(problem, products.space, products, state, room)

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        return _verdict(self._problem(products.space, state.seed), state, last=room < 1)

    def finish(
        self, state: _State, products: Products, reason: str, room: int, /
    ) -> tuple[_State, str]:
        """Check the pairs by a product, and search outside of the basis for repeated eigenvalues.

        The reason states the number of pairs that fail the check, or an eigenvalue that was missed.
        """
        space, problem = products.space, self._problem(products.space, state.seed)
        if state.failure is None:
            state = replace(state, failure=_failure(problem, space, products, state))
            room -= 1
        assert state.failure is not None
        before = products.matvecs
        pairs = _measured(problem, space, products, state, room)
        state, room = replace(state, pairs=pairs), room - (products.matvecs - before)
        missing = int((~_converged(problem, state, pairs)).sum())
        if reason.startswith("converged") and missing:
            noise = max(state.noise, state.failure / self.k**0.5)
            rounded = max(problem.eps, noise / max(state.largest, _TINY))
            return state, (
                f"the residuals of {missing} pairs cannot reach the tolerance: products are "
                f"rounded to {rounded:.0e} |A|; take a looser rtol, or float64"
            )
        if not (state.trusted or state.finished or missing):
            reason += (
                ", before a random vector could show that no wanted eigenvalue lies outside of "
                "the Krylov space of `start`: raise max_matvecs, or omit `start`"
            )
            warnings.warn(reason, stacklevel=_CALLER)
        elif (
            reason.startswith("converged")
            and self.block_size < self.k
            and not (state.finished or state.proved)
        ):
            missed = _missed(problem, space, products, state, min(self.search, room))
            if missed is not None:
                reason += (
                    f", but {missed:.6g} was met outside of the basis: repeated eigenvalues were "
                    f"missed, take block_size={min(2 * self.block_size + 2, self.k)} or more; or "
                    "rtol is too loose for close eigenvalues"
                )
                warnings.warn(reason, stacklevel=_CALLER)
        return state, reason

    def result(self, state: _State, space: Space, cost: Cost, /) -> Eigenpairs:
        problem = self._problem(space, state.seed)
        pairs = state.pairs or _chosen(problem, space, state)
        return Eigenpairs(
            values=pairs.values,
            vectors=space.vectors(pairs.rows),
            residuals=pairs.residuals,
            converged=_converged(problem, state, pairs),
            largest=state.largest,
            **cost,
        )


@dataclass(frozen=True)
class _Problem:
    k: int
    which: Which
    block_size: int
    rtol: float
    atol: float
    seed: int
    eps: float
    basis_dtype: torch.dtype
    basis_device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products and combinations."""
        return torch.promote_types(self.basis_dtype, torch.float32)


@dataclass(frozen=True)
class _State:
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
        proved: Whether a random vector has shown, after all pairs had converged, that no wanted
            eigenvalue lies outside, so that no search is needed.
        failure: Error of the recurrence for a combination of all pairs, measured by a product;
            None before that product.
        noise: Largest measured rounding of a product with a unit vector.
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
    proved: bool = False
    failure: float | None = None
    noise: float = 0.0
    pairs: _Pairs | None = None

    @property
    def size(self) -> int:
        return len(self.projected)

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, ascending, and their coefficients in the basis, as columns."""
        values, vectors = torch.linalg.eigh(self.projected)
        return values, vectors

    @property
    def largest(self) -> float:
        """Largest absolute Ritz value so far, a lower bound of |A|."""
        return max(self.before, float(self.ritz[0].abs().max())) if self.size else 0.0

    @property
    def longest(self) -> float:
        """Length of the longest column of T: at most `largest`, and cheaper."""
        columns = torch.linalg.vector_norm(self.projected, dim=0)
        return max([self.before, *columns.tolist()])


@dataclass(frozen=True)
class _Pairs:
    """Wanted Ritz values, their vectors as rows, and residuals."""

    values: Tensor
    rows: Tensor
    residuals: Tensor


def _start(
    problem: _Problem,
    space: Space,
    start: Tree | None,
    basis_size: int,
    seed: int,
    *,
    trusted: bool,
) -> _State:
    b, dtype = problem.block_size, problem.dtype
    rows = space.probes(range(b), kind="normal", seed=problem.seed, dtype=dtype)
    if start is not None:
        given = space.rows(start, dtype=dtype)
        if len(given) > b:
            # Random combinations of all given vectors, so that none is left out.
            given = space.combine(space.gram(rows, given), given)
        lengths = space.norms(given)
        if not bool(lengths.isfinite().all()):
            raise ValueError("start has entries that are NaN or infinite")
        if not bool((lengths > 0).all()):
            raise ValueError("start has a vector of zeros: each vector must be nonzero")
        rows = torch.cat([given / lengths.to(dtype)[:, None], rows[len(given) :]])
    empty = Basis.empty(space, problem.basis_dtype, problem.basis_device)
    block, _, _ = orthonormal(space, rows, empty, threshold=lambda _: 0.0)
    basis = empty.append(block, basis_size + b + (not trusted))
    none = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    coupling = torch.zeros(len(block), 0, dtype=torch.float64, device="cpu")
    return _State(
        basis, none, coupling, probes=b, basis_size=basis_size, seed=seed, trusted=trusted
    )


def _size_that_fits(problem: _Problem, space: Space, wanted: int, limit: int | None) -> int:
    k, b = problem.k, problem.block_size
    fewest = min(space.n, k + 2 * b)
    if limit is None:
        limit = available_to(space, problem.basis_device) // 2
    vector = space.widest * problem.basis_dtype.itemsize
    pairs = k * space.widest * problem.dtype.itemsize
    far = is_far(problem.basis_device, space.device)
    if far:
        block = b * space.widest * problem.dtype.itemsize
        room_beside(space, problem.basis_dtype, block + pairs)
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
    return min(wanted, most)


def _round(problem: _Problem, space: Space, products: Products, state: _State, room: int) -> _State:
    # A resumed run may keep its basis on another device than the interrupted one.
    # A state that is not copied keeps its Ritz pairs, which the verdict has computed.
    if (basis := state.basis.on(problem.basis_device)) is not state.basis:
        state = replace(state, basis=basis)
    if _is_settled(problem, state):
        return _examined(problem, space, products, state, room)
    for _ in range(max(1, int(_GROWTH_A_ROUND * state.size / problem.block_size))):
        width = len(state.basis) - state.size
        if state.size + width > state.basis_size:
            state = _restart(problem, space, state)
        if width > room or state.finished:
            break
        state = _step(problem, space, products, state)
        room -= width
    state.basis.settle(space)
    return state


def _step(problem: _Problem, space: Space, products: Products, state: _State) -> _State:
    """Multiply the next block, and split the products into new columns of T and a new block."""
    j, basis = state.size, state.basis
    images = products(basis[j:].brought(space).to(problem.dtype))
    block, factor, inner = orthonormal(
        space,
        images,
        basis,
        threshold=lambda longest: rounding(problem.eps, max(state.longest, longest)),
    )
    # A X' = [V; X]' columns + Q' F with the next block Q, so that columns = [V A X'; X A X'].
    columns = inner.mT
    # T <- [V; X] A [V; X]', and C <- [0 F]. Between them the two keep A V' = V' T + X' C.
    projected = torch.zeros(len(basis), len(basis), dtype=torch.float64, device="cpu")
    projected[:j, :j] = state.projected
    projected[:, j:] = columns
    projected[j:, :j] = columns[:j].mT
    projected[j:, j:] = (columns[j:] + columns[j:].mT) / 2
    coupling = torch.zeros(len(block), len(basis), dtype=torch.float64, device="cpu")
    coupling[:, j:] = factor
    following = replace(
        state,
        basis=basis.append(block, _room(problem, state)),
        projected=projected,
        coupling=coupling,
        steps=state.steps + 1,
        failure=None,
    )
    # The recurrence gives V A X' = C' for a symmetric A. Right after a restart, T is therefore the
    # arrowhead matrix of Wu and Simon: diag(values), bordered by C and C'.
    difference = columns[:j] - state.coupling.mT
    # The dtype of the vectors does not show that a model computes in bfloat16. Its products are
    # symmetric only up to SYMMETRIC; with a looser rtol, larger differences must be let through.
    tolerance = max(SYMMETRIC, 10 * problem.eps, 2 * problem.rtol)
    refuse_asymmetric(difference, following.longest, tolerance)
    return following if len(block) else _fresh_block(problem, space, following)


def _room(problem: _Problem, state: _State) -> int:
    """Return the number of vectors in the workspace: one more if a vector may come from outside."""
    width = len(state.basis) - state.size
    return state.basis_size + max(problem.block_size, width) + (not state.trusted)


def _fresh_block(problem: _Problem, space: Space, state: _State) -> _State:
    """Return the state with a random block outside of the invariant subspace that V spans.

    The run is finished instead if the last such block has changed no wanted value.
    """
    values, _ = _ritz(problem, state)
    floor = rounding(problem.eps, state.largest)
    nothing_new = (
        state.closed is not None
        and len(values) == problem.k == len(state.closed)
        and bool(((values - state.closed).abs() <= floor).all())
    )
    if nothing_new or state.size == space.n:
        return replace(state, closed=values, finished=True)
    width = min(problem.block_size, space.n - state.size)
    indices = range(state.probes, state.probes + width)
    rows = space.probes(indices, kind="sphere", seed=problem.seed, dtype=problem.dtype)
    block, _, _ = orthonormal(space, rows, state.basis, threshold=lambda _: 1e-3)
    return replace(
        state,
        basis=state.basis.append(block, _room(problem, state)),
        coupling=torch.zeros(len(block), state.size, dtype=torch.float64, device="cpu"),
        probes=state.probes + width,
        steps=0,
        closed=values,
        finished=len(block) == 0,
    )


def _examined(
    problem: _Problem, space: Space, products: Products, state: _State, room: int
) -> _State:
    """Return the state after one check of a recurrence whose residuals have converged.

    The first check is one product, which measures the rounding of products. If this rounding is
    below the tolerance, the residuals must fall below the difference of the two. The second check
    concerns a given start, which may lie in an invariant subspace.
    """
    if state.failure is None:
        failure = _failure(problem, space, products, state)
        noise = max(state.noise, failure / problem.k**0.5)
        pairs = _chosen(problem, space, state)
        checked = replace(pairs, residuals=pairs.residuals + failure)
        if bool(_converged(problem, state, checked).all()):
            return replace(state, failure=failure)
        return replace(state, failure=failure, noise=noise)
    return _proved(problem, space, products, state, room)


def _failure(problem: _Problem, space: Space, products: Products, state: _State) -> float:
    """Return the error of the recurrence for a random combination of the wanted Ritz vectors."""
    pairs = _chosen(problem, space, state)
    values, rows, mixture = pairs.values, pairs.rows, _mixture(problem, len(pairs.values))
    # With T Y = Y diag(values): A V' Y m = V' Y (values * m) + X' C Y m for a mixture m.
    predicted = space.combine((mixture * values)[None], rows)
    if state.size < len(state.basis):
        leak = (state.coupling @ _ritz(problem, state)[1] @ mixture)[None]
        predicted += state.basis[state.size :].combine(space, leak, problem.dtype)
    return float(space.norms(products(space.combine(mixture[None], rows)) - predicted))


def _mixture(problem: _Problem, count: int) -> Tensor:
    signs = uniforms(count, problem.seed, _KEY_OF_MIXTURE, device=torch.device("cpu")) < 0.5
    return torch.where(signs, 1.0, -1.0).double()


def _measured(
    problem: _Problem, space: Space, products: Products, state: _State, room: int
) -> _Pairs:
    """Return the wanted pairs with residuals checked by products.

    The recurrence predicts A times any combination of Ritz vectors. One product with a random
    combination has measured the error of this prediction, and the error is added to each residual.
    If the error exceeds rounding, or a residual then exceeds the tolerance, each vector is
    multiplied.
    """
    assert state.failure is not None
    pairs = _chosen(problem, space, state)
    values, rows = pairs.values, pairs.rows
    floor = rounding(problem.eps, state.largest) * len(values) ** 0.5
    checked = replace(pairs, residuals=pairs.residuals + state.failure)
    trusted = state.failure <= floor and bool(_converged(problem, state, checked).all())
    if trusted or room < len(values):
        return checked
    # Blocks bound the memory of sharded rows, which are gathered one block at a time.
    images = torch.cat([products(part) for part in rows.split(problem.block_size)])
    images.addcmul_(values.to(rows)[:, None], rows, value=-1)
    return replace(pairs, residuals=space.norms(images).cpu())


def _proved(
    problem: _Problem, space: Space, products: Products, state: _State, room: int
) -> _State:
    """Return a trusted state, or one with a random vector that leads to a wanted eigenvalue.

    Lanczos steps from a random vector outside of the basis stop when (a) they meet a value that
    belongs among the wanted ones, (b) such a value would very likely have appeared by now, or (c)
    their own outermost value has converged, as in a run without a start. They keep two vectors.
    """
    inside, _ = _ritz(problem, state)
    tolerance = float(_tolerance(problem, inside, state).max())
    known = state.basis[: state.size]
    rows = space.probes([state.probes], kind="sphere", seed=problem.seed, dtype=problem.dtype)
    first, _, _ = orthonormal(space, rows, known, threshold=lambda _: 0.0)
    row, before = first, first[:0]
    diagonal, off = list[float](), list[float]()
    for step in range(1, room + 1):
        if not len(row):
            # The rest of the space is invariant.
            return replace(state, trusted=True, proved=True)
        following, factor, inner = orthonormal(
            space,
            products(row),
            known,
            Basis(before),
            Basis(row),
            threshold=lambda longest: rounding(problem.eps, max(state.longest, longest)),
        )
        diagonal.append(float(inner[0, -1]))
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off))
        outermost = _preferred(problem.which, values)[: 1 + (problem.which == "BE")]
        if _better(problem, state, inside, values) is not None:
            coupling = torch.zeros(1, state.size, dtype=torch.float64, device="cpu")
            # The probe is orthogonal to V; it must be orthogonal to the next block X as well.
            fresh, _, _ = orthonormal(space, first.clone(), state.basis, threshold=lambda _: 1e-6)
            return replace(
                state,
                basis=state.basis.append(fresh, _room(problem, state)),
                coupling=torch.cat([state.coupling, coupling[: len(fresh)]]),
                probes=state.probes + 1,
                steps=0,
                owed=step,
                failure=None,
            )
        off.append(float(factor.norm()))
        # The residual of a Ritz vector y of m steps is beta_{m+1} |e_m'y|.
        converged = off[-1] * vectors[-1, outermost].abs() <= tolerance
        seen = _least_seen(problem, inside, values, diagonal, off) * space.n < _UNLIKELY
        if seen or bool(converged.all()):
            return replace(state, trusted=True, proved=True)
        before, row = row, following
    return state


def _least_seen(
    problem: _Problem, inside: Tensor, values: Tensor, diagonal: list[float], off: list[float]
) -> float:
    """Return an upper bound of (x'u)^2, for a unit eigenvector x of a wanted, unmet eigenvalue.

    Here u is the unit vector at which the recurrence began, and p_j are the orthonormal polynomials
    of the recurrence, with q_j = p_j(A) u. Since x'q_j = p_j(edge) x'u, Bessel's inequality gives

        (x'u)^2 <= 1 / sum_j p_j(edge)^2.

    For a random u, n (x'u)^2 is nearly chi2_1. A bound below its 1 % quantile therefore shows that
    such an x is unlikely.
    """
    seen = math.inf
    for edge in _edges(problem, inside):
        if float(values[0]) <= edge <= float(values[-1]):
            return 1.0
        # beta_{j+1} p_{j+1}(x) = (x - alpha_j) p_j(x) - beta_j p_{j-1}(x), with p_0 = 1.
        before, here, total = 0.0, 1.0, 1.0
        for i, (alpha, beta) in enumerate(zip(diagonal, off, strict=True)):
            if not beta > 0 or total > _PLENTY:
                break
            step = (edge - alpha) * here - (off[i - 1] if i else 0.0) * before
            before, here = here, step / beta
            total += here**2
        seen = min(seen, total)
    return 1 / seen


def _tridiagonal(diagonal: list[float], off: list[float]) -> Tensor:
    matrix = torch.tensor(diagonal, dtype=torch.float64, device="cpu").diag()
    if off:
        side = torch.tensor(off, dtype=torch.float64, device="cpu")
        matrix += side.diag(1) + side.diag(-1)
    return matrix


def _converged(problem: _Problem, state: _State, pairs: _Pairs) -> Tensor:
    floor, sizes = rounding(problem.eps, state.largest), pairs.values.abs()
    converged = pairs.residuals <= (problem.rtol * sizes).clamp_min(problem.atol)
    return converged | ((sizes <= floor) & (pairs.residuals <= floor))


def _missed(
    problem: _Problem, space: Space, products: Products, state: _State, room: int
) -> float | None:
    """Return a Ritz value from outside of the basis that should be a wanted one, or None."""
    inside, _ = _ritz(problem, state)
    known = state.basis[: state.size]
    steps = min(room, space.n - state.size)
    rows = space.probes([state.probes], kind="sphere", seed=problem.seed, dtype=problem.dtype)
    outside, images, values = rows[:0], rows[:0], inside[:0]
    for _ in range(steps):
        # Rows are orthonormalised in place, but these are products that must be kept.
        row, _, _ = orthonormal(space, rows.clone(), known, Basis(outside), threshold=lambda _: 0.0)
        if not len(row) or _would_be_seen(problem, inside, values, space.n):
            break
        rows = products(row)
        outside, images = torch.cat([outside, row]), torch.cat([images, rows])
        values = torch.linalg.eigvalsh(space.gram(outside, images).cpu().double())
    return _better(problem, state, inside, values)


def _better(problem: _Problem, state: _State, inside: Tensor, values: Tensor) -> float | None:
    """Return a value from outside of the basis that should be a wanted one, or None."""
    both = torch.cat([inside, values])
    order = both.argsort()
    preferred = order[_wanted(problem, both[order])]
    tolerance = float(_tolerance(problem, inside, state).max())
    tolerance = max(tolerance, rounding(problem.eps, state.largest))
    new = both[preferred[preferred >= problem.k]]
    displaced = inside[[i for i in range(problem.k) if i not in preferred.tolist()]]
    pairs = zip(new.tolist(), displaced.tolist(), strict=True)
    return next((value for value, other in pairs if abs(value - other) > tolerance), None)


def _would_be_seen(problem: _Problem, inside: Tensor, outside: Tensor, n: int) -> bool:
    """Return whether a copy of a wanted value would exceed the Ritz values outside by now.

    The squared part of its eigenvector in a random unit vector is at least 1e-4 / n, except once in
    a hundred. After s steps this part has grown by T_{s-1}(ratio)^2, with the Chebyshev polynomial
    T_m(ratio) = cosh(m acosh(ratio)) > exp(m acosh(ratio)) / 2.
    """
    steps = len(outside)
    if steps < 2:
        return False
    edges = _edges(problem, inside)
    centre = float(outside[0] + outside[-1]) / 2
    radius = float(outside[-1] - outside[0]) / 2
    ratio = min(abs(edge - centre) for edge in edges) / max(radius, 1e-300)
    if ratio <= 1:
        return False
    growth = (steps - 1) * math.acosh(min(ratio, 1e300))
    return 2 * growth - 2 * math.log(2) > math.log(1e4 * n)


def _edges(problem: _Problem, inside: Tensor) -> tuple[float, ...]:
    """Return the values beyond which an eigenvalue is a wanted one."""
    least, k = float(inside[-1]), problem.k
    return {
        "LM": (abs(least), -abs(least)),
        "LA": (least,),
        "SA": (least,),
        "BE": (float(inside[(k - 1) // 2]), float(inside[(k + 1) // 2 if k > 1 else 0])),
    }[problem.which]


def _restart(problem: _Problem, space: Space, state: _State) -> _State:
    """Shrink the basis to its best Ritz vectors, in its own memory, and keep the next block.

    With T Y = Y D for the kept Ritz pairs, the recurrence A V' = V' T + X' C turns into

        A (Y'V)' = (Y'V)' D + X' (C Y),

    the restart of Wu and Simon: T becomes the diagonal D, and C becomes C Y.
    """
    values, vectors = state.ritz
    block = state.basis[state.size :].brought(space).clone()
    room = state.basis_size - len(block)
    keep = min(room, problem.k + (state.basis_size - problem.k) // 2)
    kept = _preferred(problem.which, values)[: max(keep, 1)]
    rotation = vectors[:, kept]
    rotated = state.basis[: state.size].rotate(space, rotation, problem.dtype)
    return replace(
        state,
        basis=rotated.append(block, _room(problem, state)),
        projected=values[kept].diag(),
        coupling=state.coupling @ rotation,
        before=state.largest,
    )


def _preferred(which: Which, values: Tensor) -> Tensor:
    """Return the indices of ascending values, the most wanted first."""
    last = len(values) - 1
    if which == "LM":
        return values.abs().argsort(descending=True)
    if which == "BE":
        order = [i // 2 if i % 2 else last - i // 2 for i in range(last + 1)]
        return torch.tensor(order, dtype=torch.int64, device="cpu")
    ascending = torch.arange(last + 1, device="cpu")
    return ascending if which == "SA" else ascending.flip(0)


def _wanted(problem: _Problem, values: Tensor) -> Tensor:
    """Return the indices of the wanted among ascending values, in the order of the result."""
    wanted = _preferred(problem.which, values)[: problem.k]
    return wanted.sort(descending=True).values if problem.which == "BE" else wanted


def _chosen(problem: _Problem, space: Space, state: _State) -> _Pairs:
    """Return the wanted pairs, with the residuals of the recurrence.

    For a Ritz vector v = V'y with T y = value y, A v - value v = X' C y has the length |C y|.
    """
    values, rotation = _ritz(problem, state)
    rows = state.basis[: state.size].combine(space, rotation.mT, problem.dtype)
    return _Pairs(values, rows, torch.linalg.vector_norm(state.coupling @ rotation, dim=0))


def _ritz(problem: _Problem, state: _State) -> tuple[Tensor, Tensor]:
    """Return the wanted Ritz values, and their coefficients in the basis, as columns."""
    values, vectors = state.ritz
    wanted = _wanted(problem, values)
    return values[wanted], vectors[:, wanted]


def _tolerance(problem: _Problem, values: Tensor, state: _State) -> Tensor:
    """Return the residuals of the recurrence at which the run stops, at least eps |A|.

    The rounding of products adds to the residuals, and is subtracted from the tolerance unless it
    is too large.
    """
    least = max(problem.atol, problem.eps * state.largest)
    tolerance = (problem.rtol * values.abs()).clamp_min(least)
    below = (tolerance - _SAFETY * state.noise).clamp_min(problem.eps * state.largest)
    return torch.where(state.noise < _REACHABLE * tolerance, below, tolerance)


def _is_settled(problem: _Problem, state: _State) -> bool:
    """Return whether the residuals of the recurrence reach the tolerance or cannot shrink."""
    if state.size < problem.k:
        return False
    if state.finished:
        return True
    if state.steps < (_STEPS_TO_TRUST if state.closed is not None else state.owed):
        return False
    values, rotation = _ritz(problem, state)
    residuals = torch.linalg.vector_norm(state.coupling @ rotation, dim=0)
    return bool((residuals <= _tolerance(problem, values, state)).all())


def _verdict(problem: _Problem, state: _State, *, last: bool) -> str | None:
    """Return why the run is finished, or None. If ``last``, no product remains for a check."""
    if not _is_settled(problem, state):
        return None
    if not last and (state.failure is None or not (state.trusted or state.finished)):
        return None
    if state.finished:
        return "converged: the basis spans an invariant subspace"
    return "converged: all residuals are within the tolerance"
