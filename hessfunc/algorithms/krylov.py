"""Krylov space of an earlier run, with which estimators begin after one product.

Lanczos steps from a unit vector give orthonormal rows Q' with

    A Q = Q T + r e_j',

so that T = Q'AQ and the product A Q are known. The part of A outside of Q is all that remains to be
sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessfunc.algorithms.deflation import Deflation
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Density
from hessfunc.algorithms.symmetry import mixture, refuse_another_matrix
from hessfunc.randomness import mixed
from hessfunc.spaces.space import Space, rows_dtype

# Probes of a run that begins with the Krylov space of a probe have another seed than this probe: in
# its Krylov space, nothing of it would be left to sample.
_PROBES = -4
# Least dimension of the complement, in which probes vary.
_LEFT = 3


@dataclass(frozen=True)
class Krylov:
    """Krylov space Q with its products.

    Attributes:
        basis: Orthonormal rows Q', ``(j, n)``; no row if there is no earlier run.
        end: Vector r as a row, ``(1, n)``; no row if the space is invariant.
        core: Matrix T = Q'AQ, float64 ``(j, j)``.
        name: Name of the argument that holds the density, for messages.
    """

    basis: Tensor
    end: Tensor
    core: Tensor
    name: str

    @classmethod
    def of(cls, space: Space, density: Density | None, name: str, /) -> Krylov:
        """Return the Krylov space that a density keeps, empty for None.

        Args:
            space: Space of the vectors.
            density: Result of `slq` with ``keep_basis=True``, or None.
            name: Name of the argument that holds the density, for messages.

        Raises:
            ValueError: If the density keeps no basis, or if its basis belongs to other parameters.
        """
        if density is None:
            none = space.zeros(0, rows_dtype(space))
            return cls(none, none, torch.zeros(0, 0, dtype=torch.float64, device="cpu"), name)
        if density.basis is None or density.recurrence is None:
            raise ValueError(
                f"{name} is a density without the vectors of its Krylov space: pass "
                "slq(matvec, like, keep_basis=True)"
            )
        rows = space.rows(density.basis, dtype=rows_dtype(space))
        alphas, betas = density.recurrence.cpu().double()
        # The last vector q_m has no product in the basis unless the space is invariant, but
        # beta_(m-1) q_m is the part of A q_(m-1) outside of the others.
        invariant = float(betas[-1]) == 0
        size = max(0, min(len(rows) - (not invariant), space.n - _LEFT))
        core = alphas[:size].diag()
        core += betas[: max(size - 1, 0)].diag(1) + betas[: max(size - 1, 0)].diag(-1)
        end = rows[size : size + 1] if size else rows[:0]
        if len(end):
            end = float(betas[size - 1]) * end
        # A deflation writes behind its basis, so the memory must end with it.
        basis = rows if size == len(rows) else rows[:size].clone()
        return cls(basis, end, core, name)

    def __len__(self) -> int:
        return len(self.basis)

    def refuse_another_matrix(self, products: Products, /) -> None:
        """Raise an error if the density is not that of the matrix.

        Raises:
            ValueError: If the product with a combination of the vectors shows another matrix.

        Cost: one matvec, or none without a density.
        """
        if not len(self):
            return
        # A Q c = Q T c + c_j r.
        space, weights = products.space, mixture(len(self))
        vector = space.combine(weights[None], self.basis)
        expected = space.combine((weights @ self.core)[None], self.basis)
        if len(self.end):
            expected = expected + float(weights[-1]) * self.end
        scale = float(torch.linalg.matrix_norm(self.core, 2))
        refuse_another_matrix(products, vector, expected, 0.0, scale, self.name)

    def deflated(self, state: Deflation, space: Space, /) -> Deflation:
        """Return the state before the first product, with Q in its deflated part.

        The deflated part of A has the trace tr T and the diagonal

            diag(Q T Q') + 2 q_j * r.

        Args:
            state: State without a basis.
            space: Space of the vectors.
        """
        if not len(self):
            return state
        inside = space.combine(self.core, self.basis)
        images, twice = inside.clone(), inside
        if len(self.end):
            images[-1:] += self.end
            twice[-1:] += 2 * self.end
        entries = (self.basis * twice).sum(0, keepdim=True, dtype=state.diagonal.dtype)
        squares = images.to(state.row_squares.dtype).square().sum(0, keepdim=True)
        deflated = replace(
            state,
            basis=self.basis,
            ends=self.end,
            last=(len(self) - 1,) * len(self.end),
            # The next vector of the first chain is the direction of r.
            alive=(0,) * len(self.end),
            core=self.core,
            parts=state.parts + space.by_leaf(self.basis, twice).sum(0).cpu().double(),
            diagonal=state.diagonal + entries[: len(state.diagonal)],
            row_squares=state.row_squares + squares[: len(state.row_squares)],
            largest=float(space.norms(images).max()),
            seed=mixed(state.seed, _PROBES),
        )
        return deflated.weighted(space)
