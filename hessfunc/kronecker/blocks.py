"""The blocks of a block-diagonal curvature matrix: symmetric matrices with structure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hessfunc.memory import AT_ONCE, refuse_unless_fits
from hessfunc.spaces.space import Space
from hessfunc.trees import Tree


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a symmetric matrix, and the way to its eigenbasis.

    Attributes:
        values: ``(r,)``; all further eigenvalues are zero.
        rounding: how large an eigenvalue of each is by rounding alone, ``(r,)``.
        project: rows ``(k, n)`` -> their coordinates ``(k, r)``.
        lift: coordinates -> rows.
    """

    values: Tensor
    rounding: Tensor
    project: Callable[[Tensor], Tensor]
    lift: Callable[[Tensor], Tensor]


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues ``(..., n)``, their rounding ``(..., 1)``, and eigenvectors.

    Negative eigenvalues that rounding explains are zero, so that a positive semi-definite matrix
    stays one.
    """
    values, vectors = torch.linalg.eigh(matrices)
    eps = torch.finfo(values.dtype).eps
    rounding = values.shape[-1] * eps * values.abs().amax(-1, keepdim=True)
    return torch.where((values < 0) & (values >= -rounding), 0, values), rounding, vectors


class Block(ABC):
    """A symmetric matrix on the entries of one parameter tensor.

    Attributes:
        shape: of the parameter.
    """

    shape: torch.Size

    @property
    def n(self) -> int:
        """The dimension."""
        return self.shape.numel()

    def matvec(self, block: Tensor, /) -> Tensor:
        """The products with k vectors ``(k, *shape)``: a matvec that every algorithm takes."""
        return self._product(self._rows(block)).reshape(block.shape)

    def dense(self) -> Tensor:
        """The matrix ``(n, n)``, in the order of the flattened parameter.

        Raises:
            MemoryError: it does not fit.
        """
        refuse_unless_fits(
            2 * self.n**2,
            self._like,
            f"a dense block of {self.n} x {self.n} entries",
            "use its matvec, and cg(block.matvec, b, damping=...) for the inverse",
        )
        return self._dense()

    @abstractmethod
    def trace(self) -> float:
        """The trace, without the matrix."""

    def inverse_matvec(self, block: Tensor, damping: float, /) -> Tensor:
        """``(A + damping I)^-1`` times k vectors ``(k, *shape)``.

        The first call finds the eigenvalues, of the factors where the block has a structure; later
        ones, of any damping, use them again.

        Raises:
            ValueError: A + damping I is singular.
            MemoryError: the eigenvectors do not fit.
        """
        rows, spectrum = self._rows(block), self._spectrum
        shifted = self._shifted(damping)
        inverse = 1 / shifted[: len(spectrum.values)]
        if len(spectrum.values) < self.n:
            moved = spectrum.lift(spectrum.project(rows) * (inverse - 1 / damping))
            return (rows / damping + moved).reshape(block.shape)
        return spectrum.lift(spectrum.project(rows) * inverse).reshape(block.shape)

    def logdet(self, damping: float = 0.0, /) -> float:
        """``log det (A + damping I)``.

        Raises:
            ValueError: A + damping I is not positive definite.
        """
        shifted = self._shifted(damping).double()
        if not bool((shifted > 0).all()):
            raise ValueError(
                f"A + {damping:g} I is not positive definite, its least eigenvalue is "
                f"{float(shifted.min()):.2e}: a larger damping makes it so"
            )
        missing = self.n - len(self._spectrum.values)
        total = float(shifted[: len(self._spectrum.values)].log().sum())
        return total + (missing * math.log(damping) if missing else 0.0)

    def _shifted(self, damping: float) -> Tensor:
        """The eigenvalues of A + damping I: those of the basis, and one for all that are zero."""
        if not math.isfinite(damping):
            raise ValueError(f"damping={damping}: it must be finite")
        spectrum = self._spectrum
        zero = spectrum.values.new_zeros(1 if len(spectrum.values) < self.n else 0)
        values, rounding = (
            torch.cat([part, zero]) for part in (spectrum.values, spectrum.rounding)
        )
        shifted = values + damping
        least = rounding.clamp_min(torch.finfo(values.dtype).eps * abs(damping))
        if bool(((shifted.abs() <= least) & ~((values >= 0) & (damping > 0))).any()):
            raise ValueError(
                f"A + {damping:g} I is singular, up to rounding: take a larger damping"
            )
        return shifted

    def _rows(self, block: Tensor) -> Tensor:
        if block.dim() != len(self.shape) + 1 or block.shape[1:] != self.shape:
            expected = ", ".join(("k", *map(str, self.shape)))
            raise ValueError(
                f"a block of vectors ({expected}) is due, and got shape {tuple(block.shape)}"
            )
        return block.reshape(len(block), self.n)

    @cached_property
    def _spectrum(self) -> Spectrum:
        return self._decomposed()

    def _decomposed(self) -> Spectrum:
        values, rounding, vectors = _eigh(self.dense())
        return Spectrum(
            values,
            rounding.expand_as(values),
            lambda rows: rows @ vectors,
            lambda rows: rows @ vectors.mT,
        )

    @property
    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor of the block's dtype and device."""

    @abstractmethod
    def _product(self, rows: Tensor) -> Tensor:
        """The products with rows ``(k, n)``."""

    @abstractmethod
    def _dense(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Dense(Block):
    """A matrix without structure.

    Attributes:
        matrix: ``(n, n)``, symmetric.
    """

    matrix: Tensor
    shape: torch.Size

    def trace(self) -> float:
        return float(self.matrix.diagonal().double().sum())

    def _product(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    def _dense(self) -> Tensor:
        return self.matrix

    @property
    def _like(self) -> Tensor:
        return self.matrix


@dataclass(frozen=True, eq=False)
class Kronecker(Block):
    """``B_g (x) A_g`` for each group g: a weight ``V_g (O, K)`` -> ``B_g V_g A_g``.

    Attributes:
        left: B, on the outputs, ``(G, O, O)``.
        right: A, on the inputs, ``(G, K, K)``.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    def trace(self) -> float:
        left, right = (
            factor.diagonal(dim1=1, dim2=2).double().sum(1) for factor in (self.left, self.right)
        )
        return float(left @ right)

    def _product(self, rows: Tensor) -> Tensor:
        weights = _weights(rows, self.left, self.right)
        return (self.left @ weights @ self.right).flatten(1)

    def _dense(self) -> Tensor:
        pairs = zip(self.left, self.right, strict=True)
        return torch.block_diag(*(torch.kron(left, right) for left, right in pairs))

    def _decomposed(self) -> Spectrum:
        (b, b_rounding, left), (a, a_rounding, right) = _eigh(self.left), _eigh(self.right)
        b, a = b[:, :, None], a[:, None, :]
        rounding = b_rounding[:, :, None] * a.abs() + b.abs() * a_rounding[:, None, :]
        return _in_basis(b * a, rounding, left, right)

    @property
    def _like(self) -> Tensor:
        return self.left


@dataclass(frozen=True, eq=False)
class Eigenbasis(Block):
    """``U diag(s) U'`` with eigenvectors that are Kronecker products, ``U_g = L_g (x) R_g``.

    Attributes:
        left: L, orthogonal, ``(G, O, O)``.
        right: R, orthogonal, ``(G, K, K)``.
        values: s, ``(G, O, K)``.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    shape: torch.Size

    def trace(self) -> float:
        return float(self.values.double().sum())

    def _product(self, rows: Tensor) -> Tensor:
        return self._spectrum.lift(self._spectrum.project(rows) * self._spectrum.values)

    def _dense(self) -> Tensor:
        bases = [torch.kron(*pair) for pair in zip(self.left, self.right, strict=True)]
        pairs = zip(bases, self.values.flatten(1), strict=True)
        return torch.block_diag(*((basis * values) @ basis.mT for basis, values in pairs))

    def _decomposed(self) -> Spectrum:
        # Second moments: each is as exact as it is large.
        rounding = torch.finfo(self.values.dtype).eps * self.values.abs()
        return _in_basis(self.values, rounding, self.left, self.right)

    @property
    def _like(self) -> Tensor:
        return self.values


def _in_basis(values: Tensor, rounding: Tensor, left: Tensor, right: Tensor) -> Spectrum:
    """The spectrum ``(G, O, K)`` of eigenvectors ``L_g (x) R_g``."""
    return Spectrum(
        values.flatten(),
        rounding.flatten(),
        lambda rows: (left.mT @ _weights(rows, left, right) @ right).flatten(1),
        lambda rows: (left @ _weights(rows, left, right) @ right.mT).flatten(1),
    )


def _weights(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows ``(k, n)`` as weights ``(k, G, O, K)``."""
    return rows.reshape(len(rows), len(left), left.shape[-1], right.shape[-1])


@dataclass(frozen=True, eq=False)
class Congruence(Block):
    """``mean_m J_m' H J_m``, where J_m maps weights to outputs that share them.

        z[g, o, p] = sum_k W[g, o, k] X_m[g, k, p]

    with g the groups, o the outputs of a group, k its inputs, and p the positions. A linear layer
    has one group and one position; a convolution has as many positions as pixels.

    Attributes:
        hessian: H, ``(G O P, G O P)``.
        inputs: X, ``(M, G, K, P)``.
    """

    hessian: Tensor
    inputs: Tensor
    shape: torch.Size

    def trace(self) -> float:
        groups, outputs, positions = self._sizes
        view = self.hessian.view(groups, outputs, positions, groups, outputs, positions)
        # sum_o H[g, o, p, g, o, q], for all g, p and q.
        summed = torch.einsum("gopgoq->gpq", view)
        seconds = torch.einsum("mgkp,mgkq->gpq", self.inputs, self.inputs)
        return float((summed.double() * seconds.double()).sum() / len(self.inputs))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        _, groups, _, positions = self.inputs.shape
        return groups, len(self.hessian) // (groups * positions), positions

    def _product(self, rows: Tensor) -> Tensor:
        groups, outputs, positions = self._sizes
        weights = rows.view(len(rows), groups, outputs, self.inputs.shape[2])
        most = max(1, AT_ONCE // max(1, len(rows) * len(self.hessian)))
        total = torch.zeros_like(weights)
        for inputs in self.inputs.split(most):
            outer = torch.einsum("vgok,mgkp->mvgop", weights, inputs).flatten(2) @ self.hessian
            outer = outer.view(*outer.shape[:2], groups, outputs, positions)
            total += torch.einsum("mvgop,mgkp->vgok", outer, inputs)
        return (total / len(self.inputs)).reshape(rows.shape)

    def _dense(self) -> Tensor:
        groups, outputs, positions = self._sizes
        view = self.hessian.view(groups * outputs, positions, groups * outputs, positions)
        total = self.hessian.new_zeros(groups, outputs, self.inputs.shape[2], self.n)
        for inputs in self.inputs:
            each = inputs.repeat_interleave(outputs, dim=0)
            right = torch.einsum("apbq,bkq->apbk", view, each).reshape(
                groups, outputs, positions, self.n
            )
            total += torch.einsum("gkp,gopn->gokn", inputs, right)
        return total.view(self.n, self.n) / len(self.inputs)

    def _decomposed(self) -> Spectrum:
        """By way of the space of the outputs, where that is the smaller one."""
        groups, outputs, positions = self._sizes
        if len(self.inputs) > 1 or positions >= self.inputs.shape[2]:
            return super()._decomposed()
        # X_g = U_g S_g V_g': J'HJ = (I (x) U) (SV' H VS) (I (x) U)', with orthonormal columns U.
        left, size, right = torch.linalg.svd(self.inputs[0], full_matrices=False)
        scaled = (size[..., None] * right).repeat_interleave(outputs, dim=0)
        view = self.hessian.view(groups * outputs, positions, groups * outputs, positions)
        inner = torch.einsum("arp,apbq,bsq->arbs", scaled, view, scaled)
        values, rounding, vectors = _eigh(inner.reshape(self.hessian.shape))

        def project(rows: Tensor) -> Tensor:
            weights = rows.view(len(rows), groups, outputs, left.shape[1])
            return (weights @ left).reshape(len(rows), len(vectors)) @ vectors

        def lift(rows: Tensor) -> Tensor:
            inner = (rows @ vectors.mT).view(len(rows), groups, outputs, left.shape[2])
            return (inner @ left.mT).reshape(len(rows), self.n)

        return Spectrum(values, rounding.expand_as(values), project, lift)

    @property
    def _like(self) -> Tensor:
        return self.hessian


@dataclass(frozen=True, eq=False)
class DirectSum(Block):
    """Blocks of consecutive rows of one parameter: each row sees those of its own part alone.

    Attributes:
        parts: the blocks, in the order of the rows.
    """

    parts: tuple[Block, ...]
    shape: torch.Size

    def trace(self) -> float:
        return math.fsum(part.trace() for part in self.parts)

    def inverse_matvec(self, block: Tensor, damping: float, /) -> Tensor:
        return self._each(block, lambda part, rows: part.inverse_matvec(rows, damping))

    def logdet(self, damping: float = 0.0, /) -> float:
        return math.fsum(part.logdet(damping) for part in self.parts)

    def _each(self, block: Tensor, fn: Callable[[Block, Tensor], Tensor]) -> Tensor:
        pieces = block.split([part.shape[0] for part in self.parts], dim=1)
        return torch.cat([fn(p, rows) for p, rows in zip(self.parts, pieces, strict=True)], dim=1)

    def _product(self, rows: Tensor) -> Tensor:
        block = rows.view(len(rows), *self.shape)
        return self._each(block, lambda part, piece: part.matvec(piece)).flatten(1)

    def _dense(self) -> Tensor:
        return torch.block_diag(*(part.dense() for part in self.parts))

    @property
    def _like(self) -> Tensor:
        return self.parts[0]._like


@dataclass(frozen=True, eq=False)
class Blocks(Mapping[str, Block]):
    """A block-diagonal matrix, one block a parameter; called, it is the matvec of the whole.

    Attributes:
        blocks: by the name of the parameter, in the order of the parameters.
        space: of the parameters.
    """

    blocks: Mapping[str, Block]
    space: Space

    def __getitem__(self, name: str) -> Block:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __call__(self, block: Tree, /) -> Tree:
        return self._each(block, lambda part, rows: part.matvec(rows))

    def inverse_matvec(self, block: Tree, damping: float, /) -> Tree:
        """``(A + damping I)^-1`` times a block of trees, as `Block.inverse_matvec`."""
        return self._each(block, lambda part, rows: part.inverse_matvec(rows, damping))

    def trace(self) -> float:
        """The trace of the whole matrix."""
        return math.fsum(part.trace() for part in self.blocks.values())

    def logdet(self, damping: float = 0.0, /) -> float:
        """``log det (A + damping I)`` of the whole matrix."""
        return math.fsum(part.logdet(damping) for part in self.blocks.values())

    def _each(self, block: Tree, fn: Callable[[Block, Tensor], Tensor]) -> Tree:
        found = self.space.block_leaves(block)
        parts = [self.blocks[name] for name in self.space.names]
        return self.space.tree(fn(p, leaf) for p, leaf in zip(parts, found, strict=True))
