"""Spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, project_out
from hessfunc.algorithms.driver import Method, RunOptions, run_method
from hessfunc.algorithms.offload import home, is_far, room_beside
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Density
from hessfunc.algorithms.symmetry import SYMMETRIC, refuse_asymmetric
from hessfunc.numerics import rounding
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Space, available_to, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of Lanczos steps in a round.
_STEPS_A_ROUND = 10
# Smaller than any scale of a matrix.
_TINY = 1e-300
# The alphas are the diagonal of T. The betas are its off-diagonal, followed by the norm of the last
# residual vector, which is 0 if the Krylov space is exhausted.
_Recurrence: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]


@validated
def slq(
    matvec: Matvec,
    like: Tree,
    *,
    probes: int = 1,
    steps: int = 100,
    basis_device: torch.device | str | None = None,
    max_matvecs: int | None = None,
    **run: Unpack[RunOptions],
) -> Density:
    """Estimate the spectral density of a symmetric matrix by stochastic Lanczos quadrature.

    For a random unit vector w and T = V'AV after m Lanczos steps from w,

        w' f(A) w ~ sum_j weights_j f(nodes_j),  nodes_j = eig_j(T),  weights_j = (e_1' u_j)^2,

    with the eigenvectors u_j of T. This is a Gauss quadrature, exact for polynomials of degree
    2 m - 1. The mean over w is tr f(A) / n. All probes run as one block, each with full
    reorthogonalisation.

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
        max_matvecs: Budget, the largest number of matvecs; by default ``probes * steps``.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Density`. A probe whose Krylov space is exhausted ends early. Probes that are incomplete
        when the budget is exhausted are left out, unless none is complete.

    Raises:
        ValueError: If an option is out of range, or if the matvec is not symmetric.
        MemoryError: If the basis of one probe, steps * n numbers, does not fit in memory, or if the
            pieces of a basis on another device do not.
        FloatingPointError: If a product is not finite.

    Cost: probes * steps matvecs, in ``steps`` passes if the bases of all probes fit in memory.
    Memory: probes * (steps + 2) vectors. With bases on another device, step m copies the m vectors
    of each probe twice, 2 m n probes numbers.

    Source: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159; steps
    and probes: Chen, Trogdon and Ubaru 2021, arXiv 2105.06595.
    """
    at_least(1, probes=probes, steps=steps)
    at_least(probes, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    space = products.space
    device = home(space, basis_device)
    group = _probes_that_fit(space, probes, min(steps, space.n), device)
    method = LanczosQuadrature(probes=probes, steps=steps, basis_device=device, group=group)
    budget = probes * min(steps, space.n) if max_matvecs is None else max_matvecs
    return run_method(method, products, run, max_matvecs=budget)


@dataclass(frozen=True, kw_only=True)
class LanczosQuadrature(Method["_State", Density]):
    """Gauss quadratures of the spectral density, by Lanczos from random vectors.

    Attributes:
        probes: Number of random vectors.
        steps: Number of Lanczos steps of each.
        basis_device: Device of the bases.
        group: Number of probes that run at once.
    """

    probes: int
    steps: int
    basis_device: torch.device
    group: int

    changeable: ClassVar = frozenset({"basis_device", "group"})

    def init(self, products: Products, seed: int, /) -> _State:
        indices = range(min(self.group, self.probes))
        return self._started(products.space, (), self.group, indices, seed)

    def _started(
        self,
        space: Space,
        done: tuple[_Recurrence, ...],
        group: int,
        indices: range,
        seed: int,
    ) -> _State:
        """Return the state of new probes, with the recurrences of earlier ones in ``done``."""
        probes = space.probes(indices, kind="sphere", seed=seed, dtype=rows_dtype(space))
        probes /= math.sqrt(space.n)
        none = torch.zeros(0, len(indices), dtype=torch.float64, device="cpu")
        empty = probes.new_empty(0, *probes.shape, device=self.basis_device)
        basis = Basis(empty).append(probes[None], min(self.steps, space.n))
        return _State(basis, none, none, (-1,) * len(indices), done, group, seed)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space = products.space
        steps, eps = min(self.steps, space.n), products_eps(space)
        # A resumed run may keep its bases on another device than the interrupted one.
        if (basis := state.basis.on(self.basis_device)) is not state.basis:
            state = replace(state, basis=basis)
        if not state.active:
            started = len(state.done) + len(state.taken)
            indices = range(started, min(started + state.group, self.probes))
            following = self._started(space, state.complete, state.group, indices, state.seed)
            state = replace(following, asymmetry=state.asymmetry)
        for _ in range(_STEPS_A_ROUND):
            if not state.active or len(state.active) > room:
                break
            room -= len(state.active)
            state = _extended(products, state, steps, eps)
        state.basis.settle(space)
        return state

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        if len(state.done) + len(state.taken) < self.probes or state.active:
            return None
        steps = min(self.steps, products.space.n)
        fewest = min(len(alphas) for alphas, _ in state.recurrences)
        if fewest < steps:
            return f"complete: a Krylov space was exhausted after {fewest} steps"
        return f"complete: {steps} steps for each probe"

    def result(self, state: _State, space: Space, cost: Cost, /) -> Density:
        nodes, weights, residuals = _quadrature(state.complete or state.recurrences)
        return Density(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            n=space.n,
            eps=max(products_eps(space), state.asymmetry),
            **cost,
        )


@dataclass(frozen=True)
class _State:
    """Lanczos runs of the current group of probes, and the recurrences of earlier groups.

    Attributes:
        basis: Bases of the Krylov spaces, ``(m + 1, p, n)``. The last row is the block that is
            multiplied next. The rows lie in a workspace that a state shares with its successor.
        alphas: Diagonals of T, float64 ``(m, p)``.
        betas: Off-diagonals of T, with the norms of the residual vectors at the end, float64
            ``(m, p)``.
        taken: Number of steps of each run that has ended; -1 for an active run.
        done: Recurrences of the earlier groups.
        group: Number of probes that run at once.
        seed: Seed of the probes.
        asymmetry: Largest |u'Av - v'Au| of basis vectors so far, in units of |A|.
    """

    basis: Basis
    alphas: Tensor
    betas: Tensor
    taken: tuple[int, ...]
    done: tuple[_Recurrence, ...]
    group: int
    seed: int
    asymmetry: float = 0.0

    @property
    def active(self) -> list[int]:
        """Indices of the runs that have not ended."""
        return [i for i, taken in enumerate(self.taken) if taken < 0]

    @property
    def recurrences(self) -> tuple[_Recurrence, ...]:
        if not len(self.alphas):
            return self.done
        return (*self.done, *(self._recurrence(i) for i in range(len(self.taken))))

    @property
    def complete(self) -> tuple[_Recurrence, ...]:
        ended = (i for i, taken in enumerate(self.taken) if taken > 0)
        return (*self.done, *map(self._recurrence, ended))

    def _recurrence(self, i: int) -> _Recurrence:
        m = self.taken[i] if self.taken[i] > 0 else len(self.alphas)
        return tuple(self.alphas[:m, i].tolist()), tuple(self.betas[:m, i].tolist())


def _extended(products: Products, state: _State, steps: int, eps: float) -> _State:
    """Return the state after one step of each active run, with one transfer to the host."""
    space, basis, active = products.space, state.basis, state.active
    all_active = len(active) == len(state.taken)
    last = basis[-1:].brought(space)[0]
    images = products(last if all_active else last[active])
    alphas, asymmetries = [], []
    for i, image in zip(active, images.split(1), strict=True):
        # beta_m q_{m+1} = A q_m - alpha_m q_m - beta_{m-1} q_{m-1}, with alpha_m = q_m'A q_m. Full
        # reorthogonalisation subtracts all q_i; a second pass removes the rounding of the first.
        along = project_out(space, image, basis.of(i)) + project_out(space, image, basis.of(i))
        alphas.append(along[0, -1])
        asymmetries.append(_asymmetry(along[0, :-1], state.betas[:, i]))
    numbers = torch.zeros(3, len(state.taken), dtype=torch.float64, device="cpu")
    rows = [torch.stack(alphas), space.norms(images), torch.stack(asymmetries)]
    numbers[:, active] = torch.stack(rows).cpu().double()
    state = replace(
        state,
        alphas=torch.cat([state.alphas, numbers[:1]]),
        betas=torch.cat([state.betas, numbers[1:2]]),
    )
    size = len(state.alphas)
    # Gershgorin's bound of |T| estimates |A|.
    largest = state.alphas.abs().amax(0) + 2 * state.betas.amax(0)
    refuse_asymmetric(numbers[2], float(largest.max()), max(SYMMETRIC, 10 * eps))
    relative = float((numbers[2] / largest.clamp_min(_TINY)).max())
    exhausted = {
        i for i in active if size == space.n or numbers[1, i] <= rounding(eps, float(largest[i]))
    }
    state.betas[-1, list(exhausted)] = 0.0
    spent = exhausted if size < steps else set(active)
    state = replace(
        state,
        taken=tuple(size if i in spent else m for i, m in enumerate(state.taken)),
        asymmetry=max(state.asymmetry, relative),
    )
    if not state.active:
        return state
    # The next vectors of runs that have ended are zero.
    lengths = numbers[1]
    lengths[list(spent)] = math.inf
    images /= lengths[active].to(images)[:, None]
    block = images if all_active else torch.zeros_like(last)
    if not all_active:
        block[active] = images
    return replace(state, basis=basis.append(block[None], steps))


def _asymmetry(along: Tensor, betas: Tensor) -> Tensor:
    """Return the largest |q_i'A q_m - q_m'A q_i| for i < m, from the coefficients of A q_m.

    The recurrence gives q_m'A q_i = 0 for i < m - 1, and beta_{m-1} for i = m - 1.
    """
    if not len(along):
        return along.new_zeros(())
    last = (along[-1] - betas[-1].to(along)).abs()
    return torch.cat([along[:-1].abs(), last[None]]).amax()


def _quadrature(recurrences: Sequence[_Recurrence]) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes, weights and residual norms, ``(p, m)``; short runs end in weights of 0."""
    longest = max(len(alphas) for alphas, _ in recurrences)
    nodes = torch.zeros(len(recurrences), longest, dtype=torch.float64, device="cpu")
    weights, residuals = torch.zeros_like(nodes), torch.zeros_like(nodes)
    rows = zip(nodes, weights, residuals, recurrences, strict=True)
    for row, weight, residual, (alphas, betas) in rows:
        m = len(alphas)
        off = torch.tensor(betas[: m - 1], dtype=torch.float64, device="cpu")
        projected = (
            torch.tensor(alphas, dtype=torch.float64, device="cpu").diag()
            + off.diag(1)
            + off.diag(-1)
        )
        # Gauss quadrature (Golub and Welsch): nodes eig_j(T) and weights (e_1'u_j)^2. The Ritz
        # vector V u_j has the residual norm beta_m |e_m'u_j|.
        values, vectors = torch.linalg.eigh(projected)
        row[:m], row[m:] = values, values[-1]
        weight[:m] = vectors[0].square()
        residual[:m] = betas[m - 1] * vectors[-1].abs()
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
