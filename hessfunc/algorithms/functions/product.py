"""Products of a function of a matrix with vectors, by Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Columns
from hessfunc.algorithms.driver import Method, RunOptions, run_method
from hessfunc.algorithms.functions.accuracy import Projected, projected
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.recurrences import WORKSPACE, Recurrence, Recurrences, extended
from hessfunc.algorithms.results import MatrixFunction
from hessfunc.algorithms.solve.system import finite_rows
from hessfunc.options import at_least, real, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, available_to, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of steps after which the error is bounded again, as a share of the steps so far.
_PACE = 0.1


@validated(smallest=real, largest=real)
def function(
    matvec: Matvec,
    f: Callable[[Tensor], Tensor],
    b: Tree,
    *,
    like: Tree | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    smallest: float | None = None,
    largest: float | None = None,
    basis_size: int | None = None,
    max_matvecs: int = 1000,
    **run: Unpack[RunOptions],
) -> MatrixFunction:
    """Compute f(A) b for a symmetric matrix by Lanczos, with bounds of the error.

        f(A) b = |b| (Q f(T) e_1 + beta_m g(A) q_(m+1)),    T = Q'AQ,

    with g(x) = sum_j s_1j s_mj (f(x) - f(t_j)) / (x - t_j) for the eigenpairs (t_j, s_j) of T. The
    first term is the value, and the second one its error. For example, ``f=torch.sqrt`` turns
    normal vectors into samples with the covariance A, ``f=torch.rsqrt`` whitens, and
    ``f=lambda x: torch.exp(-t * x)`` is gradient flow for the time t. The value is exact, up to
    rounding, once the Krylov space is exhausted.

    The identity holds for every f. Since q_(m+1) is a unit vector, the least and the largest
    |b| beta_m |g(x)| over a range of x bound the error from both sides if the range contains the
    eigenvalues of A. The upper bound also contains the effect of rounding. The recurrence of a
    vector stops when the upper bound of its error is at most max(rtol |value|, atol).

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> b = torch.ones(10, dtype=torch.float64)
        >>> root = hf.function(matvec, torch.sqrt, b)
        >>> torch.allclose(root.value, A.diagonal().sqrt())
        True

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric.
        f: Function of the eigenvalues, element by element, on float64 tensors of any shape. No
            derivative is needed.
        b: Vector, a tree; with ``like``, a block of k vectors.
        like: Tree with the structure of a vector, such as the parameters, if b is a block. One call
            of the matvec serves all vectors that have not stopped.
        rtol: Relative tolerance of the error norm of each vector.
        atol: Absolute tolerance of the error norm.
        smallest: Lower bound of the eigenvalues, such as 0 for a Gauss-Newton matrix, or its
            damping. By default a bound from the Ritz pairs. If an eigenvalue is below this bound,
            the part of b along its eigenvector has at most 1.6e-6 / n of |b|^2, which is improbable
            for a random b.
        largest: Upper bound of the eigenvalues. By default a bound from the Ritz pairs.
        basis_size: Number of basis vectors that are kept in memory for each b, at least 2. By
            default the largest number that fits in half of the memory. Later vectors are not kept,
            and a second pass multiplies again to combine them.
        max_matvecs: Budget, the largest number of matvecs of all vectors together, including the
            second pass. At least one per vector.
        **run: Space, callback, progress and checkpoint, as in `RunOptions`. A resumed run may have
            another f.

    Returns:
        `MatrixFunction`, with the bounds of the error and the reason of each vector.

    Raises:
        ValueError: If an option is out of range, if b is not finite, if f is not finite at a Ritz
            value, such as the logarithm of a negative one, if a Ritz value lies outside of
            ``smallest`` and ``largest``, or if the matvec is not symmetric or not deterministic.
        FloatingPointError: If a product is not finite.

    Cost: one matvec a step and vector, and one more for each step beyond ``basis_size``. Memory:
    basis_size + 8 vectors for each b, or 3 max(steps, 32) + 8 if that is less, besides those of a
    product. The two-pass method is chosen over restarts because it serves every f, with the same
    bounds.

    Source: Druskin and Knizhnerman 1989; error: Frommer, Guettel and Schweitzer 2014; Chen,
    Greenbaum, Musco and Musco 2022, arXiv 2106.09806; two passes: Frommer and Simoncini 2008;
    rounding: Paige 1980; Musco, Musco and Sidford 2018, arXiv 1708.07788.
    """
    at_least(0, rtol=rtol, atol=atol)
    at_least(2, basis_size=basis_size)
    products = Products.of(matvec, b if like is None else like, run.get("space"))
    space = products.space
    rows = finite_rows(space, b, "b", is_block=like is not None)
    at_least(len(rows), max_matvecs=max_matvecs)
    lengths = tuple(space.norms(rows).tolist())
    method = LanczosFunction(
        f=f,
        rows=rows,
        lengths=lengths,
        is_block=like is not None,
        rtol=rtol,
        atol=atol,
        smallest=smallest,
        largest=largest,
        basis_size=basis_size or _size_that_fits(space, len(rows)),
        n=space.n,
    )
    return run_method(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class LanczosFunction(Method["_State", MatrixFunction]):
    """Lanczos approximation of f(A) b, with the options of `function`.

    Attributes:
        f: Function of the eigenvalues.
        rows: Vectors b, ``(k, n)``.
        lengths: Norms of the vectors b.
        is_block: Whether b is a block, and not one vector.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        smallest: Lower bound of the eigenvalues, or None.
        largest: Upper bound of the eigenvalues, or None.
        basis_size: Number of basis vectors kept for each b.
        n: Dimension of A.
    """

    f: Callable[[Tensor], Tensor]
    rows: Tensor
    lengths: tuple[float, ...]
    is_block: bool
    rtol: float
    atol: float
    smallest: float | None
    largest: float | None
    basis_size: int
    n: int

    is_random: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        return {"b": Columns(self.rows), "basis_size": self.basis_size}

    def init(self, products: Products, seed: int, /) -> _State:
        space = products.space
        sizes = torch.tensor(self.lengths, dtype=torch.float64, device="cpu")
        units = (
            self.rows / sizes.clamp_min(torch.finfo(self.rows.dtype).tiny).to(self.rows)[:, None]
        )
        capacity = min(self.basis_size, space.n)
        runs = Recurrences.begin(units, capacity, workspace=WORKSPACE)
        # f(A) 0 = 0 takes no step.
        runs = runs.ended({i: 0 for i, length in enumerate(self.lengths) if length == 0})
        return _State(runs, self.rows[:0])

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        runs = state.runs
        for _ in range(1 + int(_PACE * len(runs))):
            after = [len(runs) + 1 if taken < 0 else taken for taken in runs.taken]
            if not runs.active or len(runs.active) + _repeated(after, runs.capacity) > room:
                break
            room -= len(runs.active)
            runs = extended(products, runs)
        eps = products_eps(products.space)
        stopped = {i: len(runs) for i in runs.active if self._stops(self._at(runs, i, eps), i)}
        return replace(state, runs=runs.ended(stopped))

    def _at(self, runs: Recurrences, i: int, eps: float, most: int | None = None) -> Projected:
        """Return f(T) e_1 of a vector, after at most so many of its steps."""
        alphas, betas = runs.jacobi(i)
        recurrence: Recurrence = alphas[:most], betas[:most]
        # Without reorthogonalisation the rounding of all steps remains (Paige 1980).
        beyond = max(0, len(recurrence[0]) - runs.capacity)
        eps = max(eps, 2 * beyond**1.5 * eps, runs.asymmetry)
        return projected(
            recurrence,
            self.f,
            smallest=self.smallest,
            largest=self.largest,
            n=self.n,
            eps=eps,
        )

    def _tolerance(self, at: Projected, i: int) -> float:
        """Return the tolerance of the error of a vector, for a unit vector."""
        return max(self.rtol * at.norm, self.atol / self.lengths[i])

    def _stops(self, at: Projected, i: int) -> bool:
        """Return whether a vector is within its tolerance, or as accurate as rounding permits."""
        return at.upper + at.rounded <= self._tolerance(at, i) or at.upper <= at.rounded

    def _reason(self, at: Projected, i: int) -> tuple[bool, str | None]:
        """Return whether a vector is within its tolerance, and the reason to stop, if any."""
        tolerance = self._tolerance(at, i)
        if at.upper + at.rounded <= tolerance:
            return True, "converged: the upper bound of the error is within the tolerance"
        if at.upper <= at.rounded:
            return False, (
                f"the rounding of the products hides the tolerance: it moves the value by up to "
                f"{at.rounded * self.lengths[i]:.1e}, and the tolerance is "
                f"{tolerance * self.lengths[i]:.1e}; take a looser rtol, or float64"
            )
        return False, None

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        return None if state.runs.active else "converged"

    def finish(
        self, state: _State, products: Products, reason: str, room: int, /
    ) -> tuple[_State, str]:
        runs = state.runs
        steps = [len(runs.jacobi(i)[0]) for i in range(len(runs.taken))]
        if max(steps) <= runs.capacity:
            return state, reason
        eps = products_eps(products.space)
        columns = [self._coefficients(runs, i, eps, m) for i, m in enumerate(steps)]
        return replace(state, values=_second_pass(products, runs, columns)), reason

    def _coefficients(self, runs: Recurrences, i: int, eps: float, most: int) -> Tensor:
        """Return the coefficients of a value in its Krylov basis, float64 ``(most,)``."""
        if not most:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return self.lengths[i] * self._at(runs, i, eps, most).coefficients

    def result(self, state: _State, space: Space, cost: Cost, /) -> MatrixFunction:
        runs, eps, known = state.runs, products_eps(space), len(state.values) > 0
        values, bounds, solved, reasons, steps = [], [], [], [], []
        for i, length in enumerate(self.lengths):
            taken = len(runs.jacobi(i)[0])
            # Before the second pass, only the steps whose vectors are kept give a value.
            m = taken if known else min(taken, runs.capacity)
            steps.append(m)
            if m == 0:
                zero = length == 0
                values.append(torch.zeros_like(self.rows[:1]))
                bounds.append((0.0, 0.0 if zero else math.inf))
                solved.append(zero)
                reasons.append("converged: b is zero" if zero else cost["reason"])
                continue
            at = self._at(runs, i, eps, m)
            if not known:
                weights = length * at.coefficients[None]
                values.append(runs.basis.of(i)[:m].combine(space, weights, self.rows.dtype))
            bounds.append((length * at.lower, length * (at.upper + at.rounded)))
            within, reason = self._reason(at, i)
            solved.append(within)
            if reason is None and not math.isfinite(at.upper):
                reason = (
                    f"{cost['reason']}; f is not finite in [{at.ends[0]:.3g}, {at.ends[1]:.3g}], "
                    "where eigenvalues may lie: pass `smallest=` and `largest=`"
                )
            reasons.append(reason or cost["reason"])
        rows = state.values if known else torch.cat(values)
        cost["reason"] = _of_all(reasons, solved, cost["reason"])
        return MatrixFunction(
            value=space.unravel(rows if self.is_block else rows[0]),
            bounds=torch.tensor(bounds, dtype=torch.float64, device="cpu"),
            solved=torch.tensor(solved, dtype=torch.bool, device="cpu"),
            steps=tuple(steps),
            reasons=tuple(reasons),
            **cost,
        )


@dataclass(frozen=True)
class _State:
    """Lanczos recurrences of all vectors, and their products after the second pass.

    Attributes:
        runs: Recurrences from the vectors b.
        values: Products f(A) b, ``(k, n)``; no rows before the second pass, and if all basis
            vectors are in memory.
    """

    runs: Recurrences
    values: Rows = field(metadata=DIVIDED)


def _second_pass(products: Products, runs: Recurrences, columns: list[Tensor]) -> Tensor:
    """Return the combinations of all Krylov vectors, those beyond the basis multiplied again.

    The blocks of the first pass are multiplied again in the same composition, so that their
    rounding is the same: without all basis vectors, rounding changes the later vectors.

    Raises:
        ValueError: If the coefficients of the recurrences differ from those of the first pass.
    """
    space, kept, dtype = products.space, runs.capacity, runs.tail.dtype
    steps = [len(column) for column in columns]
    parts = [
        runs.basis.of(i).combine(space, column[None, :kept], dtype)
        if len(column) >= kept
        else runs.basis.of(i)[: len(column)].combine(space, column[None], dtype)
        for i, column in enumerate(columns)
    ]
    values = torch.cat(parts)
    again = replace(
        runs,
        tail=runs.tail[:0],
        alphas=runs.alphas[: kept - 1],
        betas=runs.betas[: kept - 1],
        taken=tuple(-1 if m >= kept else m for m in steps),
    )
    tolerance = products_eps(space) ** 0.5 * float(runs.alphas.abs().max() + runs.betas.max())
    for size in range(kept, max(steps)):
        again = extended(products, again)
        there = [i for i, m in enumerate(steps) if m > size]
        difference = (again.alphas[-1] - runs.alphas[size - 1])[there].abs().max()
        if float(difference) > tolerance:
            raise ValueError(
                "the matvec is not deterministic: its products differ between the two passes. Call "
                "model.eval(), fix the seed within the loss, or raise `basis_size` to keep all "
                "basis vectors"
            )
        weights = torch.stack([columns[i][size] for i in there]).to(values)
        values[there] += weights[:, None] * again.tail[-1][there]
        again = again.ended({i: size for i in again.active if steps[i] <= size})
    return values


def _repeated(steps: list[int], kept: int) -> int:
    """Return the number of products of a second pass."""
    last = max(steps) - 1
    return sum(max(0, min(m, last) - kept + 1) for m in steps)


def _of_all(reasons: list[str], solved: list[bool], reason: str) -> str:
    """Return the reason of a run from those of its vectors."""
    if len(reasons) == 1:
        return reasons[0]
    if all(solved):
        return f"converged: all {len(reasons)} errors are within their tolerances"
    other = solved.index(False)
    return f"{sum(solved)} of {len(solved)} vectors converged; vector {other}: {reasons[other]}"


def _size_that_fits(space: Space, vectors: int) -> int:
    """Return the number of basis vectors of each b that take at most half of the memory."""
    vector = vectors * space.widest * rows_dtype(space).itemsize
    # The memory of a growing basis holds the old and the new workspace for a moment.
    return int(max(2, min(space.n, available_to(space) // 3 // max(vector, 1))))
