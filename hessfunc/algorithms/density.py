"""Spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Checkpoint, Directory
from hessfunc.algorithms.results import Density, rounding
from hessfunc.algorithms.rounds import (
    Callback,
    Products,
    at_least,
    drive,
    products_eps,
    rows_dtype,
)
from hessfunc.memory import available_memory
from hessfunc.trees import Matvec, Space, Tree

__all__ = ["slq"]

# Lanczos steps between two looks of the callback.
_STEPS_A_ROUND = 10


def slq(
    matvec: Matvec,
    like: Tree,
    *,
    probes: int = 1,
    steps: int = 100,
    max_matvecs: int | None = None,
    seed: int | None = None,
    callback: Callback[Density] | None = None,
    checkpoint: Directory = None,
) -> Density:
    """The spectral density of a symmetric matrix, by stochastic Lanczos quadrature.

    For a random unit vector w and T = V'AV after m Lanczos steps from w,

        w' f(A) w ~ sum_j weights_j f(nodes_j),  nodes_j = eig_j(T),  weights_j = (e_1' u_j)^2,

    a Gauss quadrature, exact for polynomials of degree 2 m - 1; the mean over w is tr f(A) / n.
    All probes run as one block, each with full reorthogonalisation.

    Args:
        matvec: block -> block, symmetric.
        like: a tree that says what vectors look like.
        probes: random vectors. In high dimension one is nearly enough: spend on steps.
        steps: Lanczos steps a probe. The density is resolved to about 12 / steps of its range.
        max_matvecs: the budget; ``probes * steps`` by default.
        seed: of the probes.
        callback: called with the running `Density` every few steps; returning True stops.
        checkpoint: a directory that keeps the state, for a run that was killed to go on from.

    Returns:
        `Density`. A probe whose Krylov space is exhausted ends early. Probes that the budget cuts
        short are left out, unless none is complete.

    Raises:
        ValueError: an option is out of range.
        MemoryError: the basis of one probe, steps * n numbers, does not fit in memory.
        FloatingPointError: a product is not finite.

    Cost: probes * steps matvecs, in ``steps`` passes where the bases of all probes fit in memory.

    Source: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159; steps
    and probes: Chen, Trogdon and Ubaru 2021, arXiv 2105.06595.
    """
    products = Products.of(matvec, like)
    space = products.space
    at_least(1, probes=probes, steps=steps)
    at_least(probes, max_matvecs=max_matvecs)
    store = Checkpoint.of(checkpoint, "slq", products, seed, probes=probes, steps=steps)
    seed = store.seed
    steps = min(steps, space.n)
    eps = products_eps(space, rows_dtype(space))
    group = _probes_that_fit(space, probes, steps)

    def step(state: _State, room: int) -> _State:
        if all(run.ended for run in state.runs):
            started = len(state.done) + len(state.runs)
            indices = range(started, min(started + state.group, probes))
            state = replace(state, runs=_start(space, indices, seed), done=state.recurrences)
        for _ in range(_STEPS_A_ROUND):
            active = [run for run in state.runs if not run.ended]
            if not active or len(active) > room:
                break
            images = iter(products(torch.stack([run.current for run in active])))
            runs = (
                r if r.ended else _extended(space, r, next(images), steps, eps) for r in state.runs
            )
            state = replace(state, runs=tuple(runs))
            room -= len(active)
        return state

    def found(state: _State, reason: str) -> Density:
        nodes, weights = _quadrature(state.complete or state.recurrences)
        return Density(
            nodes=nodes,
            weights=weights,
            n=space.n,
            eps=eps,
            **products.cost(reason, seed),
        )

    def verdict(state: _State) -> str | None:
        if len(state.done) + len(state.runs) < probes or not all(r.ended for r in state.runs):
            return None
        fewest = min(len(alphas) for alphas, _ in state.recurrences)
        if fewest < steps:
            return f"complete: a Krylov space was exhausted after {fewest} steps"
        return f"complete: {steps} steps for each probe"

    state, reason = drive(
        _State(_start(space, range(min(group, probes)), seed), (), group),
        products=products,
        step=step,
        verdict=verdict,
        running=lambda state: found(state, "running"),
        max_matvecs=probes * steps if max_matvecs is None else max_matvecs,
        callback=callback,
        storage=store,
    )
    return found(state, reason)


# The diagonal and the off-diagonal of T.
_Recurrence: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class _Run:
    """The Lanczos run of one probe.

    Attributes:
        basis: of the Krylov space, rows; one more than ``alphas``.
        alphas: the diagonal of T.
        betas: the off-diagonal of T.
        ended: no step is left, or the Krylov space is exhausted.
    """

    basis: Tensor
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    ended: bool = False

    @property
    def current(self) -> Tensor:
        return self.basis[-1]


@dataclass(frozen=True)
class _State:
    """The runs of the present group of probes, and the recurrences of the groups before it.

    Attributes:
        runs: of the present group.
        done: of the groups before it.
        group: how many probes run at once.
    """

    runs: tuple[_Run, ...]
    done: tuple[_Recurrence, ...]
    group: int

    @property
    def recurrences(self) -> tuple[_Recurrence, ...]:
        return (*self.done, *((run.alphas, run.betas) for run in self.runs if run.alphas))

    @property
    def complete(self) -> tuple[_Recurrence, ...]:
        return (*self.done, *((run.alphas, run.betas) for run in self.runs if run.ended))


def _start(space: Space, indices: range, seed: int) -> tuple[_Run, ...]:
    probes = space.probes(indices, kind="sphere", seed=seed, dtype=rows_dtype(space))
    return tuple(_Run(probe[None] / math.sqrt(space.n)) for probe in probes)


def _extended(space: Space, run: _Run, image: Tensor, steps: int, eps: float) -> _Run:
    size = len(run.alphas) + 1
    rest = image[None]
    alpha = 0.0
    # Twice is enough: the second pass removes what rounding left of the first.
    for _ in range(2):
        inner = space.gram(rest, run.basis)
        rest = rest - space.combine(inner, run.basis)
        alpha += float(inner[0, -1])
    beta = float(space.norms(rest))
    alphas = (*run.alphas, alpha)
    largest = max(abs(a) for a in alphas) + 2 * max((*run.betas, beta))
    if size == steps or beta <= rounding(eps, largest):
        return replace(run, alphas=alphas, ended=True)
    basis = _appended(run.basis, rest[0] / beta, steps)
    return replace(run, basis=basis, alphas=alphas, betas=(*run.betas, beta))


def _appended(basis: Tensor, row: Tensor, most: int) -> Tensor:
    """The basis with one more row, in the same memory where that has room for ``most`` rows."""
    size, n = basis.shape
    if basis.untyped_storage().nbytes() < most * n * basis.itemsize:
        basis = torch.cat([basis, basis.new_empty(most - size, n)])
    basis = basis.as_strided((size + 1, n), (n, 1))
    basis[size] = row
    return basis


def _quadrature(recurrences: Sequence[_Recurrence]) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``(p, m)``; short runs are filled up with nodes of weight 0."""
    longest = max(len(alphas) for alphas, _ in recurrences)
    nodes = torch.zeros(len(recurrences), longest, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    for row, weight, (alphas, betas) in zip(nodes, weights, recurrences, strict=True):
        m = len(alphas)
        if m == 0:
            continue
        off = torch.tensor(betas[: m - 1], dtype=torch.float64)
        projected = torch.tensor(alphas, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1)
        values, vectors = torch.linalg.eigh(projected)
        row[:m], row[m:] = values, values[-1]
        weight[:m] = vectors[0].square()
    return nodes, weights


def _probes_that_fit(space: Space, probes: int, steps: int) -> int:
    """How many probes may run at once, for the bases to take at most half of the memory."""
    basis = steps * space.n * rows_dtype(space).itemsize
    free = available_memory(space.device)
    if basis > free:
        raise MemoryError(
            f"the basis of one probe, {steps} vectors of {space.n} entries, takes "
            f"{basis / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: take fewer steps"
        )
    return max(1, min(probes, free // 2 // basis))
