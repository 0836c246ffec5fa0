"""Spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis
from hessfunc.algorithms.checkpoint import Columns
from hessfunc.algorithms.driver import Method, RunOptions, run_method
from hessfunc.algorithms.offload import home, is_far, room_beside
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.recurrences import Recurrence, Recurrences, eigenpairs_of, extended
from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.algorithms.results.deflated import with_eigenvalues
from hessfunc.algorithms.span import Span
from hessfunc.display import Achieved
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Space, available_to, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of Lanczos steps in a round.
_STEPS_A_ROUND = 10


@validated
def slq(
    matvec: Matvec,
    like: Tree,
    *,
    probes: int = 1,
    steps: int = 100,
    basis_device: torch.device | str | None = None,
    deflate: Eigenpairs | None = None,
    keep_basis: bool = False,
    max_matvecs: int | None = None,
    **run: Unpack[RunOptions],
) -> Density:
    """Estimate the spectral density of a symmetric matrix by stochastic Lanczos quadrature.

    For a random unit vector w and T = V'AV after m Lanczos steps from w,

        w' f(A) w ~ sum_j weights_j f(nodes_j),  nodes_j = eig_j(T),  weights_j = (e_1' u_j)^2,

    with the eigenvectors u_j of T. This is a Gauss quadrature, exact for polynomials of degree
    2 m - 1. The mean over w is tr f(A) / n. All probes run as one block, each with full
    reorthogonalisation.

    Known eigenpairs (value_i, V_i) need not be sampled. With P = I - VV', k pairs, and probes u in
    the complement of V,

        tr f(A) = sum_i f(value_i) + (n - k) E[u' f(PAP) u],

    up to the residuals of the pairs, by which the bounds of the result are wider.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> density = hf.slq(matvec, like, probes=4, steps=10, seed=0)
        >>> low, high = density.count_above(8.5)
        >>> low <= 2 <= high
        True

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric.
        like: Tree that shows the structure of a vector.
        probes: Number of random vectors. In high dimension one is nearly enough, and more steps are
            the better use of matvecs.
        steps: Number of Lanczos steps of each probe. They resolve the density to about 12 / steps
            of its range.
        basis_device: Device of the bases, by default that of the vectors. ``"cpu"`` keeps the bases
            of a GPU's vectors in page-locked host memory and copies them to the GPU in pieces, the
            next one while the current one is in use. The GPU then holds two pieces, of 128 MiB or
            of one vector, besides the probes. The results are those of bases on the GPU up to
            rounding.
        deflate: Eigenpairs of A, from `lanczos`, which become nodes of the weight 1 / n. Their
            vectors must be orthonormal.
        keep_basis: Whether the result keeps the Lanczos vectors of one probe, so that
            ``trace(..., start=density)`` and ``diagonal(..., start=density)`` begin with its Krylov
            space after one product.
        max_matvecs: Budget, the largest number of matvecs; by default ``probes * steps``, and one
            more with ``deflate``.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Density`. A probe whose Krylov space is exhausted ends early. Probes that are incomplete
        when the budget is exhausted are left out, unless none is complete.

    Raises:
        ValueError: If an option is out of range, if the eigenpairs belong to other parameters or to
            another matrix, or if the matvec is not symmetric.
        MemoryError: If the basis of one probe, steps * n numbers, does not fit in memory, or if the
            pieces of a basis on another device do not.
        FloatingPointError: If a product is not finite.

    Cost: probes * steps matvecs, in ``steps`` passes if the bases of all probes fit in memory, and
    one that checks ``deflate``. Memory: probes * (steps + 2) vectors. With bases on another device,
    step m copies the m vectors of each probe twice, 2 m n probes numbers.

    Source: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159; steps
    and probes: Chen, Trogdon and Ubaru 2021, arXiv 2105.06595.
    """
    at_least(1, probes=probes, steps=steps)
    at_least(probes, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    space = products.space
    if keep_basis and deflate is not None:
        raise ValueError(
            "keep_basis=True keeps a Krylov space of the matrix, and a run with `deflate` has one "
            "of its complement: pass only one of the two"
        )
    device = home(space, basis_device)
    span = Span.of(space, deflate, "deflate")
    steps = min(steps, space.n - len(span))
    method = LanczosQuadrature(
        probes=probes,
        steps=steps,
        basis_device=device,
        group=_probes_that_fit(space, probes, steps, device),
        keep_basis=keep_basis,
        span=span,
    )
    budget = probes * steps + (len(span) > 0) if max_matvecs is None else max_matvecs
    return run_method(method, products, run, max_matvecs=budget)


@dataclass(frozen=True, kw_only=True)
class LanczosQuadrature(Method["_State", Density]):
    """Gauss quadratures of the spectral density, by Lanczos from random vectors.

    Attributes:
        probes: Number of random vectors.
        steps: Number of Lanczos steps of each, at most the dimension that is sampled.
        basis_device: Device of the bases.
        group: Number of probes that run at once.
        keep_basis: Whether the result keeps the Lanczos vectors of one probe.
        span: Span of the known eigenpairs, which is not sampled.
    """

    probes: int
    steps: int
    basis_device: torch.device
    group: int
    keep_basis: bool
    span: Span

    changeable: ClassVar = frozenset({"basis_device", "group", "keep_basis"})

    def options(self) -> dict[str, Any]:
        return {**super().options(), "span": Columns(self.span.basis)}

    def init(self, products: Products, seed: int, /) -> _State:
        self.span.refuse_another_matrix(products)
        indices = range(min(self.group, self.probes))
        return self._started(products.space, (), self.group, indices, seed)

    def _started(
        self,
        space: Space,
        done: tuple[Recurrence, ...],
        group: int,
        indices: range,
        seed: int,
        asymmetry: float = 0.0,
    ) -> _State:
        """Return the state of new probes, with the recurrences of earlier ones in ``done``."""
        drawn = space.probes(indices, kind="sphere", seed=seed, dtype=rows_dtype(space))
        probes = self.span.complement(space, drawn, on_sphere=True)
        probes /= math.sqrt(space.n - len(self.span))
        runs = Recurrences.begin(probes, self.steps, device=self.basis_device)
        return _State(replace(runs, asymmetry=asymmetry), done, group, seed)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, runs = products.space, state.runs
        outside = Basis(self.span.basis) if len(self.span) else None
        least = float(self.span.values.abs().max()) if len(self.span) else 0.0
        # A resumed run may keep its bases on another device than the interrupted one.
        if (basis := runs.basis.on(self.basis_device)) is not runs.basis:
            runs = replace(runs, basis=basis)
        if not runs.active:
            started = len(state.done) + len(runs.taken)
            indices = range(started, min(started + state.group, self.probes))
            state = self._started(
                space, state.complete, state.group, indices, state.seed, runs.asymmetry
            )
            runs = state.runs
        for _ in range(_STEPS_A_ROUND):
            if not runs.active or len(runs.active) > room:
                break
            room -= len(runs.active)
            runs = extended(products, runs, self.steps, outside=outside, least=least)
        runs.basis.settle(space)
        return replace(state, runs=runs)

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        runs = state.runs
        if len(state.done) + len(runs.taken) < self.probes or runs.active:
            return None
        fewest = min(len(alphas) for alphas, _ in state.recurrences)
        if fewest < self.steps:
            return f"complete: a Krylov space was exhausted after {fewest} steps"
        return f"complete: {self.steps} steps for each probe"

    def achieved(self, state: _State, space: Space, cost: Cost, /) -> Achieved:
        return Achieved(converged=len(state.complete), wanted=self.probes)

    def result(self, state: _State, space: Space, cost: Cost, /) -> Density:
        nodes = with_eigenvalues(
            *quadrature(state.complete or state.recurrences),
            values=self.span.values,
            errors=self.span.residuals,
            n=space.n,
        )
        return Density(
            **nodes,
            n=space.n,
            eps=max(products_eps(space), state.runs.asymmetry),
            **(self._kept(state, space) if self.keep_basis else {}),
            **cost,
        )

    def _kept(self, state: _State, space: Space) -> dict[str, Any]:
        """Return the Lanczos vectors and the coefficients of the first probe of the last group."""
        recurrence = torch.tensor(state.runs.jacobi(0), dtype=torch.float64, device="cpu")
        rows = state.runs.basis.of(0)[: recurrence.shape[1]].brought(space)
        return {"basis": space.vectors(rows.clone()), "recurrence": recurrence}


@dataclass(frozen=True)
class _State:
    """Lanczos recurrences of the current group of probes, and those of earlier groups.

    Attributes:
        runs: Recurrences of the current group.
        done: Recurrences of the earlier groups.
        group: Number of probes that run at once.
        seed: Seed of the probes.
    """

    runs: Recurrences
    done: tuple[Recurrence, ...]
    group: int
    seed: int

    @property
    def recurrences(self) -> tuple[Recurrence, ...]:
        return (*self.done, *self.runs.begun)

    @property
    def complete(self) -> tuple[Recurrence, ...]:
        return (*self.done, *self.runs.complete)


def quadrature(recurrences: Sequence[Recurrence], /) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes, weights and residual norms, ``(p, m)``; short runs end in weights of 0.

    Args:
        recurrences: Coefficients of the Lanczos recurrences of the probes.
    """
    longest = max(len(alphas) for alphas, _ in recurrences)
    nodes = torch.zeros(len(recurrences), longest, dtype=torch.float64, device="cpu")
    weights, residuals = torch.zeros_like(nodes), torch.zeros_like(nodes)
    rows = zip(nodes, weights, residuals, recurrences, strict=True)
    for row, weight, residual, recurrence in rows:
        # Gauss quadrature (Golub and Welsch): nodes eig_j(T) and weights (e_1'u_j)^2. The Ritz
        # vector V u_j has the residual norm beta_m |e_m'u_j|.
        values, vectors = eigenpairs_of(recurrence)
        m = len(values)
        row[:m], row[m:] = values, values[-1]
        weight[:m] = vectors[0].square()
        residual[:m] = recurrence[1][-1] * vectors[-1].abs()
    return nodes, weights, residuals


def _probes_that_fit(space: Space, probes: int, steps: int, device: torch.device) -> int:
    """Return the number of probes whose bases take at most half of the memory, at least 1."""
    dtype = rows_dtype(space)
    basis = steps * space.widest * dtype.itemsize
    free = available_to(space, device)
    if basis > free:
        raise MemoryError(
            f"the basis of one probe, {steps} vectors of {space.widest} entries, takes "
            f"{basis / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: take fewer steps, or "
            "`basis_device='cpu'` on a GPU"
        )
    group = max(1, min(probes, free // 2 // basis))
    if is_far(device, space.device):
        vector = space.widest * dtype.itemsize
        group = min(group, room_beside(space, dtype, vector) // vector)
    return group
