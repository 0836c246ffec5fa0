"""Thick-restart Lanczos, with full reorthogonalisation."""

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
from hessfunc.algorithms.results import Eigenpairs, rounding
from hessfunc.algorithms.starts import of_starts
from hessfunc.algorithms.symmetry import SYMMETRIC, refuse_asymmetric
from hessfunc.options import at_least, validated
from hessfunc.randomness import uniforms
from hessfunc.spaces.space import Space, available_to, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

Which = Literal["LM", "LA", "SA", "BE"]

# Between two looks at the Ritz values the basis grows by this share: a look costs m^3 flops.
_GROWTH_A_ROUND = 1 / 16
# Residuals must fall so many times the rounding of products below the tolerance, where that is less
# than this part of it.
_SAFETY = 1.25
_REACHABLE = 0.7
# chi2_1 is smaller once in 100 times.
_UNLIKELY = 1.57e-4
# Larger than any number of eigenvalues, over that.
_PLENTY = 1e40
# Smaller than any scale of a matrix.
_TINY = 1e-300
# Probes of the same seed are functions of other keys: (seed, index, leaf), no index negative.
_KEY_OF_MIXTURE = -1
# Frames between a warning and the caller of `lanczos`.
_CALLER = 5
# So many steps from a fresh vector, outside of what was found, must find nothing better.
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
    """A few extreme eigenpairs of a symmetric matrix, by thick-restart Lanczos.

    With an orthonormal basis V of a Krylov space and T = V A V', the Ritz pairs of T approximate
    the extreme eigenpairs of A. A full basis is shrunk to its best Ritz vectors and grown again.
    A pair has converged when

        |A v - value v| <= max(rtol |value|, atol),

    as checked at the end by a product with a random combination of all, and by k products where
    that shows more than rounding; a value that is zero up to rounding, when its
    residual is too. Where the rounding of the products, some eps |A|, hides the tolerance, pairs
    are not said to have converged, and the reason says so.

    A Krylov space of blocks of b vectors holds b copies of a repeated eigenvalue at the most.
    Where b < k, a few more steps are made from a fresh vector outside of the basis; if they meet
    an eigenvalue that should have been among the k, the run warns, and the reason says so. That
    they meet none is no proof.

    Args:
        matvec: block -> block, symmetric. The block is a view of the basis, which restarts write
            over: a matvec that keeps one must clone it.
        like: a tree that says what vectors look like.
        k: how many pairs, at most n.
        which: ``"LM"`` largest in absolute value, in that order; ``"LA"`` largest, descending;
            ``"SA"`` smallest, ascending; ``"BE"`` k/2 from each end, descending (one more from
            the top if k is odd).
        block_size: how many vectors are multiplied at once. A matrix with an eigenvalue repeated
            b times needs blocks of b to be sure of all of them.
        basis_size: the most vectors that are kept, k + 2 block_size at least; by default 2 k + 10,
            or k + 4 block_size if that is more.
        basis_bytes: the most memory that the basis, the next block and the pairs may take, in
            bytes; by default half of what is available. It lowers ``basis_size`` where that is
            larger. With ``basis_device`` it is that device's, and the pairs are not counted. Say
            it where several ranks keep theirs in the memory of one host.
        basis_dtype: in which the basis is kept; the vectors' own by default, float32 at least.
            ``torch.bfloat16`` takes half of the memory of float32. Products are still made and
            combined in float32, but the entries of the basis are rounded to 2^-9 of their size,
            and residuals do not fall far below 2e-3 |A|: take ``rtol=0.01`` or more. Where that
            shows they are measured pair by pair, with k products more. Values lose up to 2^-9.
        basis_device: where the basis is kept; by default where the vectors are. ``"cpu"`` keeps
            that of a GPU's vectors in the memory of the host, page-locked, and brings it to the
            GPU a piece at a time, the next one while one is worked on. The GPU then holds two
            pieces, of 128 MiB or of one vector, besides the block and the pairs. The results are
            those of a basis on the GPU up to rounding, and a run may go on with either.
        rtol: the relative tolerance of residuals.
        atol: the absolute tolerance of residuals, in units of the eigenvalues.
        max_matvecs: the budget, the final check included.
        search: the most steps from a fresh vector outside of the basis; 0 makes none, and takes a
            start on trust.
        start: a tree to start from, or a block, such as the vectors of an earlier run: more of
            them than ``block_size`` are mixed; random by default. As a start may lie in an
            invariant subspace, Lanczos steps from a random vector outside of the basis follow, at
            one product each, until a wanted eigenvalue there would have been met.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Eigenpairs`. Where not all k have converged, ``converged`` and ``reason`` say so.

    Raises:
        ValueError: an option is out of range, or the matvec is not symmetric.
        MemoryError: not even a basis of k + 2 block_size vectors fits in memory, or the pieces of
            one that is kept elsewhere do not.
        FloatingPointError: a product is not finite.

    Cost: one matvec a basis vector, and one at the end; 2 to ``search`` more where block_size < k,
    and with a start as many as show that nothing was missed, about as a few pairs take.
    A matvec takes 4 basis_size n flops of reorthogonalisation, twice; (basis_size + block_size + k)
    n numbers of memory besides those of a product, and 4 search n more where block_size < k.
    From another device each block step brings the m vectors that are there
    twice, once for either projection: 2 m n numbers, and a restart moves up to 4 m n.

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
    # The last product is kept for the check of the pairs.
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
        """Check the pairs by a product, and look outside of the basis for repeated eigenvalues."""
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
                "the Krylov space of `start`: take more max_matvecs, or no start"
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
                    "rtol is too loose for values that are close"
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
        """Of products and combinations."""
        return torch.promote_types(self.basis_dtype, torch.float32)


@dataclass(frozen=True)
class _State:
    """``A V' = V' T + X' C``: V the first rows of the basis, X the rest, the next block.

    The basis lies in a workspace that a state shares with its successor: a step writes behind the
    basis alone. A restart writes over it, and leaves no state but the new one.

    Attributes:
        basis: orthonormal rows, V above X.
        projected: T, float64 on the CPU.
        coupling: C, float64 on the CPU, one column a row of V.
        probes: random vectors drawn so far.
        steps: block steps since the last random start.
        closed: the wanted values when an invariant subspace was last found.
        finished: nothing is left to be found outside of V.
        basis_size: the most vectors that are kept.
        before: the largest absolute Ritz value before the last restart, which may let it go.
        trusted: Whether a random vector has had its part in the Krylov space, or has shown that no
            wanted eigenvalue lies outside of it.
        proved: Whether a random vector has shown it after all pairs had converged, so that nothing
            is left to be searched.
        owed: Block steps from the last random vector that must be made, as so many of them have
            shown a wanted eigenvalue outside of the basis.
        failure: Length by which the recurrence fails for a combination of all pairs, as measured
            by a product; None until then.
        noise: Largest rounding of a product with a unit vector, as far as it was measured.
        pairs: Wanted pairs with residuals that products have checked; None until the run is over.
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
        """All Ritz values, ascending, and their vectors in the basis, as columns."""
        values, vectors = torch.linalg.eigh(self.projected)
        return values, vectors

    @property
    def largest(self) -> float:
        """The largest absolute Ritz value that was seen."""
        return max(self.before, float(self.ritz[0].abs().max())) if self.size else 0.0

    @property
    def longest(self) -> float:
        """The longest column of T, which is no longer than `largest`, and sooner computed."""
        columns = torch.linalg.vector_norm(self.projected, dim=0)
        return max([self.before, *columns.tolist()])


@dataclass(frozen=True)
class _Pairs:
    """The wanted Ritz values, their vectors as rows, and residuals."""

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
            # Every given vector has its part in the block, in random proportions.
            given = space.combine(space.gram(rows, given), given)
        lengths = space.norms(given)
        if not bool(lengths.isfinite().all()):
            raise ValueError("start has entries that are NaN or infinite")
        if not bool((lengths > 0).all()):
            raise ValueError("start has a vector of zeros")
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
            f"{limit / 2**30:.2f} GiB may be used: take fewer pairs, a smaller block, "
            "`basis_dtype=torch.bfloat16`, `basis_device='cpu'` on a GPU, `power_iteration`, or "
            "more `basis_bytes`"
        )
    return min(wanted, most)


def _round(problem: _Problem, space: Space, products: Products, state: _State, room: int) -> _State:
    # The state of an interrupted run may come from a run that kept its basis elsewhere.
    state = replace(state, basis=state.basis.on(problem.basis_device))
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
    """Multiply the next block, and split the product in T's new columns and a new block."""
    j, basis = state.size, state.basis
    images = products(basis[j:].brought(space).to(problem.dtype))
    block, factor, inner = orthonormal(
        space,
        images,
        basis,
        threshold=lambda longest: rounding(problem.eps, max(state.longest, longest)),
    )
    columns = inner.mT
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
    difference = columns[:j] - state.coupling.mT
    # Products of a model that computes in bfloat16 are symmetric up to that alone, and its vectors
    # do not tell; but who asks for less than that is not to be refused.
    tolerance = max(SYMMETRIC, 10 * problem.eps, 2 * problem.rtol)
    refuse_asymmetric(difference, following.longest, tolerance)
    return following if len(block) else _fresh_block(problem, space, following)


def _room(problem: _Problem, state: _State) -> int:
    """How many vectors the workspace holds: with a block that was met outside, one more."""
    width = len(state.basis) - state.size
    return state.basis_size + max(problem.block_size, width) + (not state.trusted)


def _fresh_block(problem: _Problem, space: Space, state: _State) -> _State:
    """V spans an invariant subspace: look outside of it, unless the last look found nothing."""
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
    """A state whose recurrence has converged, after the next doubt was looked into.

    The first is the rounding of products, which one product measures. Where it leaves room below
    the tolerance, residuals must fall by as much again. The second is a start that was given, as
    it may lie in an invariant subspace.
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
    """How far A times a random combination of the wanted Ritz vectors is from the recurrence's."""
    pairs = _chosen(problem, space, state)
    values, rows, mixture = pairs.values, pairs.rows, _mixture(problem, len(pairs.values))
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
    """Return the wanted pairs, with residuals that products have checked.

    The recurrence predicts A times any combination of Ritz vectors. One product with a random
    combination has shown by how much the prediction fails, and that failure is added to each
    residual. Where it is larger than rounding, or a residual is then too long, each vector is
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
    # In blocks: where rows are divided over ranks, so many of them are gathered at once.
    images = torch.cat([products(part) for part in rows.split(problem.block_size)])
    images.addcmul_(values.to(rows)[:, None], rows, value=-1)
    return replace(pairs, residuals=space.norms(images).cpu())


def _proved(
    problem: _Problem, space: Space, products: Products, state: _State, room: int
) -> _State:
    """A state that can be trusted, or one with a random vector that leads to a wanted eigenvalue.

    Lanczos steps from a random vector outside of the basis go on until they have met a value that
    should be among the wanted ones, or would have met it, or until their own outermost value has
    converged, as that of a run without a start. They keep two vectors.
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
            # Not only outside of V, but of the next block.
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
        converged = off[-1] * vectors[-1, outermost].abs() <= tolerance
        seen = _least_seen(problem, inside, values, diagonal, off) * space.n < _UNLIKELY
        if seen or bool(converged.all()):
            return replace(state, trusted=True, proved=True)
        before, row = row, following
    return state


def _least_seen(
    problem: _Problem, inside: Tensor, values: Tensor, diagonal: list[float], off: list[float]
) -> float:
    """The most that an unseen eigenvector of a wanted value may have of a vector, squared.

    With the orthonormal polynomials p_j of the recurrence it is ``1 / sum_j p_j(x)^2``.
    """
    seen = math.inf
    for edge in _edges(problem, inside):
        if float(values[0]) <= edge <= float(values[-1]):
            return 1.0
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
    """A Ritz value from outside of the basis that should have been among the wanted ones."""
    inside, _ = _ritz(problem, state)
    known = state.basis[: state.size]
    steps = min(room, space.n - state.size)
    rows = space.probes([state.probes], kind="sphere", seed=problem.seed, dtype=problem.dtype)
    outside, images, values = rows[:0], rows[:0], inside[:0]
    for _ in range(steps):
        # The rows are worked on in place, and the images are kept.
        row, _, _ = orthonormal(space, rows.clone(), known, Basis(outside), threshold=lambda _: 0.0)
        if not len(row) or _would_be_seen(problem, inside, values, space.n):
            break
        rows = products(row)
        outside, images = torch.cat([outside, row]), torch.cat([images, rows])
        values = torch.linalg.eigvalsh(space.gram(outside, images).cpu().double())
    return _better(problem, state, inside, values)


def _better(problem: _Problem, state: _State, inside: Tensor, values: Tensor) -> float | None:
    """A value from outside of the basis that should be among the wanted ones."""
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
    """Whether a copy of a wanted value would have risen above the Ritz values outside.

    Its square in a random unit vector is 1e-4 / n at the least, but for one in a hundred, and
    grows with the square of a Chebyshev polynomial.
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
    """The values beyond which an eigenvalue is a wanted one."""
    least, k = float(inside[-1]), problem.k
    return {
        "LM": (abs(least), -abs(least)),
        "LA": (least,),
        "SA": (least,),
        "BE": (float(inside[(k - 1) // 2]), float(inside[(k + 1) // 2 if k > 1 else 0])),
    }[problem.which]


def _restart(problem: _Problem, space: Space, state: _State) -> _State:
    """Shrink the basis to its best Ritz vectors, in its own memory; the next block stays."""
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
    """The indices of ascending values, the most wanted first."""
    last = len(values) - 1
    if which == "LM":
        return values.abs().argsort(descending=True)
    if which == "BE":
        order = [i // 2 if i % 2 else last - i // 2 for i in range(last + 1)]
        return torch.tensor(order, dtype=torch.int64, device="cpu")
    ascending = torch.arange(last + 1, device="cpu")
    return ascending if which == "SA" else ascending.flip(0)


def _wanted(problem: _Problem, values: Tensor) -> Tensor:
    """The indices of the wanted among ascending values, in the order of the result."""
    found = _preferred(problem.which, values)[: problem.k]
    return found.sort(descending=True).values if problem.which == "BE" else found


def _chosen(problem: _Problem, space: Space, state: _State) -> _Pairs:
    """The wanted pairs, with the residuals of the recurrence."""
    values, rotation = _ritz(problem, state)
    rows = state.basis[: state.size].combine(space, rotation.mT, problem.dtype)
    return _Pairs(values, rows, torch.linalg.vector_norm(state.coupling @ rotation, dim=0))


def _ritz(problem: _Problem, state: _State) -> tuple[Tensor, Tensor]:
    """The wanted Ritz values, and their vectors in the basis, as columns."""
    values, vectors = state.ritz
    wanted = _wanted(problem, values)
    return values[wanted], vectors[:, wanted]


def _tolerance(problem: _Problem, values: Tensor, state: _State) -> Tensor:
    """The residuals of the recurrence at which to stop: below eps |A| they mean nothing.

    The rounding of products comes on top of them, and is left out where it is too large for that.
    """
    least = max(problem.atol, problem.eps * state.largest)
    tolerance = (problem.rtol * values.abs()).clamp_min(least)
    below = (tolerance - _SAFETY * state.noise).clamp_min(problem.eps * state.largest)
    return torch.where(state.noise < _REACHABLE * tolerance, below, tolerance)


def _is_settled(problem: _Problem, state: _State) -> bool:
    """Whether the residuals of the recurrence are small enough, or cannot become smaller."""
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
    """Why the run is finished, or None. No product may be left for an examination."""
    if not _is_settled(problem, state):
        return None
    if not last and (state.failure is None or not (state.trusted or state.finished)):
        return None
    if state.finished:
        return "converged: the basis spans an invariant subspace"
    return "converged: all residuals are within the tolerance"
