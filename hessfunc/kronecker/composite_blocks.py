"""Diagonal blocks made from other blocks: permutations and direct sums."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.kronecker.block import Block, Damping, Shifted, Spectrum
from hessfunc.kronecker.linear_maps import Layout


class _Reordered(Block):
    """Matrix on the entries of a parameter in another order."""

    inner: Block

    @abstractmethod
    def _permuted(self, rows: Tensor) -> Tensor:
        """Return rows ``(k, n)`` in the order of the inner block."""

    @abstractmethod
    def _restored(self, rows: Tensor) -> Tensor:
        """Return rows ``(k, n)`` in the order of the parameter."""

    def trace(self) -> float:
        return self.inner.trace()

    def diagonal(self) -> Tensor:
        return self._restored(self.inner.diagonal().reshape(1, -1)).reshape(self.shape)

    def norm(self) -> float:
        return self.inner.norm()

    def _shifted(self, damping: float, method: Damping = "exact") -> Shifted:
        return self.inner._shifted(damping, method)

    def _product(self, rows: Tensor) -> Tensor:
        inner = self._permuted(rows).view(len(rows), *self.inner.shape)
        return self._restored(self.inner.matvec(inner).flatten(1))

    def _dense(self) -> Tensor:
        return self._restored(self._restored(self.inner.dense()).mT)

    def _decomposed(self) -> Spectrum:
        inner = self.inner._spectrum
        return Spectrum(
            inner.values,
            inner.rounding,
            lambda rows: inner.project(self._permuted(rows)),
            lambda rows: self._restored(inner.lift(rows)),
        )

    @property
    def _like(self) -> Tensor:
        return self.inner._like


@dataclass(frozen=True, eq=False, repr=False)
class Permuted(_Reordered):
    """Matrix on the entries of a parameter in another order, as for a transposed weight.

    Attributes:
        inner: Matrix on the permuted entries.
        layout: View of the parameter, and the permutation of its axes.
        shape: Shape of the parameter.
    """

    inner: Block
    layout: Layout
    shape: torch.Size

    def _permuted(self, rows: Tensor) -> Tensor:
        return self.layout.permuted(rows).flatten(1)

    def _restored(self, rows: Tensor) -> Tensor:
        return self.layout.restored(rows.view(len(rows), *self.layout.sizes), torch.Size((self.n,)))


@dataclass(frozen=True, eq=False, repr=False)
class Joint(_Reordered):
    """Matrix on a weight and its bias together, the flat weight first.

    The inner block belongs to the weights ``(1, O, K + 1)`` whose last input is 1.

    Attributes:
        inner: Matrix on the joint weights.
        layout: Order of the entries of the weight.
        shape: Number of entries of the weight and the bias, ``(n,)``.
    """

    inner: Block
    layout: Layout
    shape: torch.Size

    def _permuted(self, rows: Tensor) -> Tensor:
        _, outputs, inputs = self.layout.sizes
        weights = self.layout.permuted(rows[:, : outputs * inputs])
        bias = rows[:, outputs * inputs :].view(len(rows), 1, outputs, 1)
        return torch.cat([weights, bias], 3).flatten(1)

    def _restored(self, rows: Tensor) -> Tensor:
        _, outputs, inputs = self.layout.sizes
        joint = rows.view(len(rows), 1, outputs, inputs + 1)
        flat = torch.Size((outputs * inputs,))
        weights = self.layout.restored(joint[..., :-1], flat)
        return torch.cat([weights, joint[..., -1].flatten(1)], 1)


@dataclass(frozen=True, eq=False, repr=False)
class DirectSum(Block):
    """Direct sum of diagonal blocks, each on consecutive rows of one parameter.

    Attributes:
        parts: Diagonal blocks, in the order of the rows.
        shape: Shape of the parameter.
    """

    parts: tuple[Block, ...]
    shape: torch.Size

    def trace(self) -> float:
        return math.fsum(part.trace() for part in self.parts)

    def diagonal(self) -> Tensor:
        return torch.cat([part.diagonal() for part in self.parts])

    def norm(self) -> float:
        return math.hypot(*(part.norm() for part in self.parts))

    def _product(self, rows: Tensor) -> Tensor:
        pieces = zip(self.parts, self._pieces(rows), strict=True)
        return torch.cat(
            [part.matvec(piece.view(-1, *part.shape)).flatten(1) for part, piece in pieces], 1
        )

    def _pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([part.n for part in self.parts], 1)

    def _decomposed(self) -> Spectrum:
        spectra = [part._spectrum for part in self.parts]
        ranks = [len(spectrum.values) for spectrum in spectra]

        def project(rows: Tensor) -> Tensor:
            pieces = zip(spectra, self._pieces(rows), strict=True)
            return torch.cat([spectrum.project(piece) for spectrum, piece in pieces], 1)

        def lift(rows: Tensor) -> Tensor:
            pieces = zip(spectra, rows.split(ranks, 1), strict=True)
            return torch.cat([spectrum.lift(piece) for spectrum, piece in pieces], 1)

        values, rounding = (
            torch.cat([getattr(spectrum, name) for spectrum in spectra])
            for name in ("values", "rounding")
        )
        return Spectrum(values, rounding, project, lift)

    def _shifted(self, damping: float, method: Damping = "exact") -> Shifted:
        if method == "exact":
            return super()._shifted(damping)
        # Each part has its own zero eigenvalues; those of the whole share the last entry.
        parts = [part._shifted(damping, method) for part in self.parts]
        last = super()._shifted(damping)
        ranks = [len(part._spectrum.values) for part in self.parts]

        def joined(name: str) -> Tensor:
            own = [getattr(p, name)[:rank] for p, rank in zip(parts, ranks, strict=True)]
            return torch.cat([*own, getattr(last, name)[sum(ranks) :]])

        return Shifted(joined("values"), joined("rounding"), joined("is_positive"))

    def _dense(self) -> Tensor:
        return torch.block_diag(*(part.dense() for part in self.parts))

    @property
    def _like(self) -> Tensor:
        return self.parts[0]._like
