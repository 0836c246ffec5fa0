"""Diagonal blocks in factored form: Kronecker products, eigenbases, congruences and others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hessfunc.kronecker.block import Block, Damping, Shifted, Spectrum, decomposition
from hessfunc.memory import AT_ONCE


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Block):
    """Diagonal block without structure.

    Attributes:
        matrix: Symmetric matrix ``(n, n)``.
        shape: Shape of the parameter.
    """

    matrix: Tensor
    shape: torch.Size

    def trace(self) -> float:
        return float(self.matrix.diagonal().double().sum())

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.shape)

    def norm(self) -> float:
        return float(torch.linalg.matrix_norm(self.matrix.double()))

    def _product(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    def _dense(self) -> Tensor:
        return self.matrix

    @property
    def _like(self) -> Tensor:
        return self.matrix


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(Block):
    """Kronecker product ``B_g (x) A_g`` for each group g.

    The product with a weight ``V_g (O, K)`` is ``B_g V_g A_g``.

    Attributes:
        left: Factors B on the outputs, ``(G, O, O)``, or their diagonals ``(G, O)``.
        right: Factors A on the inputs, ``(G, K, K)``, or their diagonals ``(G, K)``.
        shape: Shape of the parameter.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    def trace(self) -> float:
        # tr(B (x) A) = tr(B) tr(A), summed over the groups.
        left, right = (_diagonal(factor).double().sum(1) for factor in (self.left, self.right))
        return float(left @ right)

    def diagonal(self) -> Tensor:
        pairs = _diagonal(self.left)[:, :, None] * _diagonal(self.right)[:, None]
        return pairs.reshape(self.shape)

    def norm(self) -> float:
        # |B (x) A|_F = |B|_F |A|_F, and the squares of the groups add up.
        left, right = (
            factor.double().square().flatten(1).sum(1) for factor in (self.left, self.right)
        )
        return math.sqrt(float(left @ right))

    def _product(self, rows: Tensor) -> Tensor:
        # (B (x) A) vec(V) = vec(B V A') with V flattened row by row, and A is symmetric.
        weights = _weights(rows, self.left, self.right)
        return _times(weights, self.left, self.right).flatten(1)

    def _dense(self) -> Tensor:
        pairs = zip(_square(self.left), _square(self.right), strict=True)
        return torch.block_diag(*(torch.kron(left, right) for left, right in pairs))

    def _decomposed(self) -> Spectrum:
        # B = L diag(b) L' and A = R diag(a) R' give B (x) A = (L (x) R) diag(b (x) a) (L (x) R)'.
        # To first order, the error of a product b a is |da| |b| + |db| |a|.
        (b, b_rounding, left), (a, a_rounding, right) = self._sides
        b, a = b[:, :, None], a[:, None, :]
        rounding = b_rounding[:, :, None] * a.abs() + b.abs() * a_rounding[:, None, :]
        return _in_basis(b * a, rounding, left, right)

    @cached_property
    def _sides(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Eigenvalues of both factors, their rounding errors, and the eigenvectors."""
        return _decomposition(self.left), _decomposition(self.right)

    def _shifted(self, damping: float, method: Damping = "exact") -> Shifted:
        if method == "exact":
            return super()._shifted(damping)
        (b, b_rounding, _), (a, a_rounding, _) = self._sides
        ratio = torch.ones_like(b[:, :1])
        if method == "heuristic":
            # pi = sqrt((tr A / K) / (tr B / O)) for each group, 1 if a trace vanishes.
            means = a.mean(1, keepdim=True) / b.mean(1, keepdim=True)
            ratio = torch.where((means > 0) & means.isfinite(), means, 1.0).sqrt()
        b, a = b + damping**0.5 / ratio, a + damping**0.5 * ratio
        b, a = b[:, :, None], a[:, None, :]
        rounding = b_rounding[:, :, None] * a.abs() + b.abs() * a_rounding[:, None, :]
        values = (b * a).flatten()
        is_positive = (values > 0) & bool(damping > 0)
        return Shifted(values, rounding.flatten(), is_positive)

    @property
    def _like(self) -> Tensor:
        return self.left


@dataclass(frozen=True, eq=False, repr=False)
class Eigenbasis(Block):
    """Matrix ``U diag(s) U'`` whose eigenvectors are Kronecker products ``U_g = L_g (x) R_g``.

    Attributes:
        left: Orthogonal matrices L, ``(G, O, O)``, or their diagonals ``(G, O)``.
        right: Orthogonal matrices R, ``(G, K, K)``, or their diagonals ``(G, K)``.
        values: Eigenvalues s, ``(G, O, K)``.
        shape: Shape of the parameter.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    shape: torch.Size

    def trace(self) -> float:
        return float(self.values.double().sum())

    def diagonal(self) -> Tensor:
        # The entry (o, k) is sum_jl L[o, j]^2 s[j, l] R[k, l]^2.
        return _times(self.values, self.left.square(), adjoint(self.right.square())).reshape(
            self.shape
        )

    def norm(self) -> float:
        return float(self.values.double().norm())

    def _product(self, rows: Tensor) -> Tensor:
        return self._spectrum.lift(self._spectrum.project(rows) * self._spectrum.values)

    def _dense(self) -> Tensor:
        sides = _square(self.left), _square(self.right)
        bases = [torch.kron(*pair) for pair in zip(*sides, strict=True)]
        pairs = zip(bases, self.values.flatten(1), strict=True)
        return torch.block_diag(*((basis * values) @ basis.mT for basis, values in pairs))

    def _decomposed(self) -> Spectrum:
        # The eigenvalues are sums of squares of projections: the error of each is relative to its
        # own size, and a projection that vanishes is n eps of the longest.
        eps, size = torch.finfo(self.values.dtype).eps, max(self.values.shape[1:])
        zero = (4 * size * eps) ** 2 * self.values.abs().amax((1, 2), keepdim=True)
        rounding = eps * self.values.abs() + zero
        return _in_basis(self.values, rounding, self.left, self.right)

    @property
    def _like(self) -> Tensor:
        return self.values


def _in_basis(values: Tensor, rounding: Tensor, left: Tensor, right: Tensor) -> Spectrum:
    """Return the spectrum with eigenvalues ``(G, O, K)`` and eigenvectors ``L_g (x) R_g``."""
    # (L (x) R)' vec(V) = vec(L' V R), and (L (x) R) vec(V) = vec(L V R').
    return Spectrum(
        values.flatten(),
        rounding.flatten(),
        lambda rows: _times(_weights(rows, left, right), adjoint(left), right).flatten(1),
        lambda rows: _times(_weights(rows, left, right), left, adjoint(right)).flatten(1),
    )


def _weights(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """View rows ``(k, n)`` as weights ``(k, G, O, K)``."""
    return rows.reshape(len(rows), len(left), left.shape[-1], right.shape[-1])


def _times(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``L V R`` for weights V; a factor ``(G, n)`` is the diagonal of a matrix."""
    weights = left[..., None] * weights if left.dim() == 2 else left @ weights
    return weights * right[:, None] if right.dim() == 2 else weights @ right


def adjoint(factor: Tensor, /) -> Tensor:
    """Return the transpose of the matrices ``(G, n, n)``, or of the diagonal ones ``(G, n)``."""
    return factor if factor.dim() == 2 else factor.mT


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)


def _square(factor: Tensor) -> Tensor:
    # `torch.kron` needs contiguous matrices, and those of eigenvectors are not.
    return torch.diag_embed(factor) if factor.dim() == 2 else factor.contiguous()


def _decomposition(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if factor.dim() == 3:
        return decomposition(factor)
    # The unit vectors are eigenvectors of a diagonal matrix: their matrix has the diagonal 1.
    return factor, torch.finfo(factor.dtype).eps * factor.abs(), torch.ones_like(factor)


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalBlock(Block):
    """Diagonal matrix.

    Attributes:
        values: Diagonal, in the shape of the parameter.
        shape: Shape of the parameter.
    """

    values: Tensor
    shape: torch.Size
    is_diagonal: ClassVar[bool] = True

    def trace(self) -> float:
        return float(self.values.double().sum())

    def diagonal(self) -> Tensor:
        return self.values

    def norm(self) -> float:
        return float(self.values.double().norm())

    def _product(self, rows: Tensor) -> Tensor:
        return rows * self.values.flatten()

    def _dense(self) -> Tensor:
        return torch.diag(self.values.flatten())

    def _decomposed(self) -> Spectrum:
        values = self.values.flatten()
        rounding = torch.finfo(values.dtype).eps * values.abs()
        return Spectrum(values, rounding, lambda rows: rows, lambda rows: rows)

    @property
    def _like(self) -> Tensor:
        return self.values


@dataclass(frozen=True, eq=False, repr=False)
class Congruence(Block):
    """Mean congruence ``mean_m J_m' H J_m``, where J_m maps a shared weight to its outputs.

        z[g, o, p] = sum_k W[g, o, k] X_m[g, k, p]

    Here g counts the groups, o the outputs of a group, k its inputs, and p the positions. A linear
    layer has one group and one position; a convolution has one position for each output pixel.

    Attributes:
        hessian: Matrix H on the outputs, ``(G O P, G O P)``.
        inputs: Inputs X, ``(M, G, K, P)``.
        shape: Shape of the parameter.
    """

    hessian: Tensor
    inputs: Tensor
    shape: torch.Size

    def trace(self) -> float:
        # tr(J'HJ) = sum_gpq (sum_o H[g, o, p, g, o, q]) (sum_k X[g, k, p] X[g, k, q]).
        groups, outputs, positions = self._sizes
        view = self.hessian.view(groups, outputs, positions, groups, outputs, positions)
        summed = torch.einsum("gopgoq->gpq", view)
        seconds = torch.einsum("mgkp,mgkq->gpq", self.inputs, self.inputs)
        return float((summed.double() * seconds.double()).sum() / len(self.inputs))

    def diagonal(self) -> Tensor:
        # The entry (g, o, k) is mean_m sum_pq X[g, k, p] H[g, o, p, g, o, q] X[g, k, q].
        groups, outputs, positions = self._sizes
        view = self.hessian.view(groups * outputs, positions, groups * outputs, positions)
        own = torch.einsum("apaq->apq", view).view(groups, outputs, positions, positions)
        half = torch.einsum("mgkp,gopq->mgokq", self.inputs, own)
        total = torch.einsum("mgokq,mgkq->gok", half, self.inputs) / len(self.inputs)
        return total.reshape(self.shape)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Numbers of groups, of outputs in a group, and of positions."""
        _, groups, _, positions = self.inputs.shape
        return groups, len(self.hessian) // (groups * positions), positions

    def _product(self, rows: Tensor) -> Tensor:
        groups, outputs, positions = self._sizes
        weights = rows.view(len(rows), groups, outputs, self.inputs.shape[2])
        most = max(1, AT_ONCE // max(1, len(rows) * len(self.hessian)))
        total = torch.zeros_like(weights)
        for inputs in self.inputs.split(most):
            # J v, H (J v), and J' (H J v), for the inputs of this chunk.
            outer = torch.einsum("vgok,mgkp->mvgop", weights, inputs).flatten(2) @ self.hessian
            outer = outer.view(*outer.shape[:2], groups, outputs, positions)
            total += torch.einsum("mvgop,mgkp->vgok", outer, inputs)
        return (total / len(self.inputs)).reshape(rows.shape)

    def _dense(self) -> Tensor:
        groups, outputs, positions = self._sizes
        view = self.hessian.view(groups * outputs, positions, groups * outputs, positions)
        total = self.hessian.new_zeros(groups, outputs, self.inputs.shape[2], self.n)
        for inputs in self.inputs:
            # H J, then J' (H J). Row a = (g, o) of J takes the inputs of its group g.
            each = inputs.repeat_interleave(outputs, dim=0)
            right = torch.einsum("apbq,bkq->apbk", view, each).reshape(
                groups, outputs, positions, self.n
            )
            total += torch.einsum("gkp,gopn->gokn", inputs, right)
        return total.view(self.n, self.n) / len(self.inputs)

    def _decomposed(self) -> Spectrum:
        """Return the spectrum from a matrix on the outputs if this is smaller than the block."""
        groups, outputs, positions = self._sizes
        if len(self.inputs) > 1 or positions >= self.inputs.shape[2]:
            return super()._decomposed()
        # X_g = U_g S_g V_g' gives J'HJ = (I (x) U) (S V' H V S) (I (x) U)'. The columns of U are
        # orthonormal, so that the eigenvalues of S V' H V S are those of the block, up to zeros.
        left, size, right = torch.linalg.svd(self.inputs[0], full_matrices=False)
        scaled = (size[..., None] * right).repeat_interleave(outputs, dim=0)
        view = self.hessian.view(groups * outputs, positions, groups * outputs, positions)
        inner = torch.einsum("arp,apbq,bsq->arbs", scaled, view, scaled)
        values, rounding, vectors = decomposition(inner.reshape(self.hessian.shape))

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
