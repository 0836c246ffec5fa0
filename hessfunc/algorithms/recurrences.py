"""Lanczos recurrences from several vectors, which share the calls of the matvec.

Each vector has its own Krylov space, basis and Jacobi matrix T. If the bases do not fit in memory,
they keep their first vectors only, and the recurrence continues from the last two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessfunc.algorithms.basis import Basis, project_out
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.symmetry import SYMMETRIC, refuse_asymmetric
from hessfunc.numerics import rounding
from hessfunc.spaces.space import DIVIDED, Rows, products_eps

# Smaller than any scale of a matrix.
_TINY = 1e-300
# The alphas are the diagonal of T. The betas are its off-diagonal, followed by the norm of the last
# residual vector, which is 0 if the Krylov space is exhausted.
Recurrence: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
Numbers: TypeAlias = NDArray[np.float64]
# Number of basis vectors for which a run of unknown length reserves memory from the start.
WORKSPACE = 32


@dataclass(frozen=True)
class Recurrences:
    """Lanczos recurrences A Q = Q T + beta_m q_(m+1) e_m' from p unit vectors.

    Attributes:
        basis: First vectors of each Krylov space, ``(min(m + 1, capacity), p, n)``. The rows lie in
            a workspace that a state shares with its successor.
        tail: Last vectors of each Krylov space, at most 2, if they are not in the basis,
            ``(0 to 2, p, n)``. The last vector of basis and tail is multiplied next.
        alphas: Diagonals of T, float64 ``(m, p)``.
        betas: Off-diagonals of T, with the norms of the residual vectors at the end, float64
            ``(m, p)``.
        taken: Number of steps of each recurrence that has ended; -1 for an active one.
        capacity: Largest number of basis vectors.
        workspace: Number of vectors for which memory is reserved from the start.
        asymmetry: Largest |u'Av - v'Au| of basis vectors so far, in units of |A|.
    """

    basis: Basis
    tail: Rows = field(metadata=DIVIDED)
    alphas: Tensor
    betas: Tensor
    taken: tuple[int, ...]
    capacity: int
    workspace: int
    asymmetry: float = 0.0

    @classmethod
    def begin(
        cls,
        units: Tensor,
        capacity: int,
        /,
        *,
        workspace: int | None = None,
        device: torch.device | None = None,
    ) -> Recurrences:
        """Return recurrences before their first steps.

        Args:
            units: Vectors of unit length, rows ``(p, n)``.
            capacity: Largest number of basis vectors.
            workspace: Number of vectors for which memory is reserved from the start, by default
                the capacity. The memory doubles when it is full.
            device: Device of the bases, by default that of the vectors.
        """
        room = capacity if workspace is None else min(workspace, capacity)
        none = torch.zeros(0, len(units), dtype=torch.float64, device="cpu")
        empty = units.new_empty(0, *units.shape)
        basis = Basis(empty.to(device or units.device)).append(units[None], room)
        return cls(basis, empty, none, none, (-1,) * len(units), capacity, room)

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def active(self) -> list[int]:
        """Indices of the recurrences that have not ended."""
        return [i for i, taken in enumerate(self.taken) if taken < 0]

    @property
    def complete(self) -> tuple[Recurrence, ...]:
        """Coefficients of the recurrences that have ended after some steps."""
        return tuple(self.jacobi(i) for i, taken in enumerate(self.taken) if taken > 0)

    @property
    def begun(self) -> tuple[Recurrence, ...]:
        """Coefficients of all recurrences, none before the first step."""
        return tuple(map(self.jacobi, range(len(self.taken)))) if len(self) else ()

    def jacobi(self, i: int, /) -> Recurrence:
        """Return the coefficients of the i-th recurrence."""
        m = len(self) if self.taken[i] < 0 else self.taken[i]
        return tuple(self.alphas[:m, i].tolist()), tuple(self.betas[:m, i].tolist())

    def ended(self, steps: dict[int, int], /) -> Recurrences:
        """Return the recurrences, some of which end after these numbers of steps."""
        taken = tuple(steps.get(i, m) for i, m in enumerate(self.taken))
        return replace(self, taken=taken)


def extended(
    products: Products,
    runs: Recurrences,
    steps: int | None = None,
    /,
    *,
    outside: Basis | None = None,
    least: float = 0.0,
) -> Recurrences:
    """Return the recurrences after one step of each active one, with one transfer to the host.

    Args:
        products: Products of the run.
        runs: Recurrences, at least one of them active.
        steps: Largest number of steps, after which a recurrence ends, or None.
        outside: Orthonormal rows V for recurrences of PAP with P = I - V'V, whose vectors are
            orthogonal to V; None for A itself.
        least: Known lower bound of |A|, the scale of the rounding of products.

    Raises:
        ValueError: If the matvec is not symmetric.
    """
    space, basis, active = products.space, runs.basis, runs.active
    eps, tail, size = products_eps(space), runs.tail, runs.alphas.shape[0] + 1
    all_active, kept = len(active) == len(runs.taken), basis.rows.shape[0]
    beyond = tail.shape[0]
    last = tail[-1] if beyond else basis[-1:].brought(space)[0]
    images = products(last if all_active else last[active])
    along = []
    known, width = ((), 0) if outside is None else ((outside,), len(outside))
    for i, image in zip(active, images.split(1), strict=True):
        # beta_m q_{m+1} = A q_m - alpha_m q_m - beta_{m-1} q_{m-1}, with alpha_m = q_m'A q_m. Full
        # reorthogonalisation then subtracts the rounding along all q_i. Beyond the capacity only
        # the last two are subtracted: the others need not be orthogonal to q_m by then, and what is
        # subtracted along them would be missing in A Q = Q T.
        whole = basis.of(i)
        recent: tuple[Basis, ...] = (whole[max(0, kept + beyond - 2) :],)
        if beyond:
            recent = (*recent, Basis(tail[:, i]))
        first = project_out(space, image, *known, *recent)[:, width:]
        every = recent if beyond else (whole,)
        along.append(project_out(space, image, *known, *every)[:, width:])
        along[-1][:, -first.shape[1] :] += first
    coefficients = along[0] if len(along) == 1 else torch.cat(along)
    transferred = torch.cat([coefficients, space.norms(images)[:, None]], dim=1).cpu().double()
    # The host computes with NumPy, whose operations on few numbers are the cheaper ones.
    numbers, alphas, betas = (x.numpy() for x in (transferred, runs.alphas, runs.betas))
    asymmetries = _asymmetries(numbers[:, :-2], betas[-1:, active])
    row = np.zeros((2, 1, len(runs.taken)))
    row[:, 0, active] = numbers[:, -2:].T
    alphas, betas = np.concatenate([alphas, row[0]]), np.concatenate([betas, row[1]])
    # Gershgorin's bound of |T| estimates |A|.
    largest = np.maximum(np.abs(alphas).max(0) + 2 * betas.max(0), least)
    worst = float(asymmetries.max())
    refuse_asymmetric(worst, float(largest.max()), max(SYMMETRIC, 10 * eps))
    relative = float((asymmetries / np.maximum(largest[active], _TINY)).max())
    # Vectors that are not orthogonal to all earlier ones may be more than n.
    whole_space = size == space.n - width and not beyond
    exhausted = [
        i for i in active if whole_space or betas[-1, i] <= rounding(eps, float(largest[i]))
    ]
    lengths = betas[-1].copy()
    betas[-1, exhausted] = 0.0
    spent = active if size == steps else exhausted
    taken = tuple(size if i in spent else m for i, m in enumerate(runs.taken))
    runs = replace(
        runs,
        alphas=torch.from_numpy(alphas),
        betas=torch.from_numpy(betas),
        taken=taken,
        asymmetry=max(runs.asymmetry, relative),
    )
    if len(spent) == len(active):
        return runs
    # The next vectors of recurrences that have ended are zero.
    lengths[spent] = math.inf
    images /= torch.from_numpy(lengths[active]).to(images)[:, None]
    block = images if all_active else torch.zeros_like(last)
    if not all_active:
        block[active] = images
    if kept < runs.capacity:
        room = runs.workspace if size < runs.workspace else min(2 * size, runs.capacity)
        return replace(runs, basis=basis.append(block[None], room), workspace=room)
    return replace(runs, tail=torch.cat([tail[-1:], block[None]]))


def _asymmetries(along: Numbers, betas: Numbers) -> Numbers:
    """Return the largest |q_i'A q_m - q_m'A q_i| of each recurrence for i < m, ``(p,)``.

    The recurrence gives q_m'A q_i = 0 for i < m - 1, and beta_{m-1} for i = m - 1.

    Args:
        along: Coefficients of A q_m, ``(p, m - 1)`` or the last of them.
        betas: Last beta of each recurrence, ``(1, p)``; no row before the first step.
    """
    if not along.shape[1]:
        return np.zeros(len(along))
    differences = np.abs(along)
    differences[:, -1] = np.abs(along[:, -1] - betas[0])
    largest: Numbers = differences.max(1)
    return largest


def eigenpairs_of(recurrence: Recurrence, /) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of the Jacobi matrix, ascending, and its eigenvectors as columns.

    Both are float64 on the CPU.
    """
    alphas, betas = recurrence
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64, device="cpu")
    diagonal = torch.tensor(alphas, dtype=torch.float64, device="cpu").diag()
    values, vectors = torch.linalg.eigh(diagonal + off.diag(1) + off.diag(-1))
    return values, vectors
