"""Arithmetic of Kronecker-factored diagonal blocks: sums, inverses and determinants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hessfunc.containers import opened
from hessfunc.kronecker.block import Block
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.factored_blocks import Eigenbasis, Kronecker


def is_bias(block: Block, /) -> bool:
    """Return whether the block belongs to a bias, whose input factor is the number 1."""
    return len(block.shape) == 1


def scaled(blocks: Blocks, /, *, left: float, right: float) -> Blocks:
    """Return the blocks with scaled factors; the number 1 of a bias stays.

    Args:
        blocks: Blocks with Kronecker factors, or with eigenvalues.
        left: Scale of the output factors, and of the eigenvalues.
        right: Scale of the input factors.
    """

    def of_block(block: Block) -> Block:
        if isinstance(block, Kronecker):
            inputs = block.right if is_bias(block) else right * block.right
            return replace(block, left=left * block.left, right=inputs)
        return replace(_corrected(block), values=left * _corrected(block).values)

    return _each(blocks, of_block)


def added(blocks: Blocks, others: Blocks, /) -> Blocks:
    """Return the blocks with the sums of the Kronecker factors; the number 1 of a bias stays."""

    def of_pair(block: Kronecker, other: Kronecker) -> Block:
        inputs = block.right if is_bias(block) else block.right + other.right
        return replace(block, left=block.left + other.left, right=inputs)

    pairs = {
        name: of_pair(_factored(block), _factored(others[name])) for name, block in blocks.items()
    }
    return replace(blocks, blocks=pairs)


def with_identities(blocks: Blocks, /) -> Blocks:
    """Return the blocks with identity matrices as output factors."""

    def of_block(block: Block) -> Block:
        left = _factored(block).left
        return replace(_factored(block), left=torch.eye(left.shape[-1]).to(left).expand_as(left))

    return _each(blocks, of_block)


def inverse(blocks: Blocks, dampings: Callable[[str], tuple[float, float]], /) -> Blocks:
    """Return the blocks with the inverses of the damped factors.

        (A + a I)^-1 (x) (B + b I)^-1

    Args:
        blocks: Blocks with Kronecker factors.
        dampings: Function of the name of a parameter that returns a and b. The number 1 of a bias
            is not damped.

    Raises:
        ValueError: If a damped factor is not positive definite.
    """

    def of_block(name: str, block: Kronecker) -> Block:
        a, b = dampings(name)
        right = block.right if is_bias(block) else _damped_inverse(block.right, a)
        return replace(block, left=_damped_inverse(block.left, b), right=right)

    inverted = {name: of_block(name, _factored(block)) for name, block in blocks.items()}
    return replace(blocks, blocks=inverted)


def _damped_inverse(factors: Tensor, damping: float) -> Tensor:
    # In float64, because the factors are often nearly singular.
    damped = factors.double() + damping * torch.eye(factors.shape[-1]).to(factors.double())
    root, failed = torch.linalg.cholesky_ex(damped)
    # The squared diagonal of the root has the pivots, at most as large as the diagonal.
    pivots, diagonal = (m.diagonal(dim1=1, dim2=2) for m in (root.square(), damped))
    least = damped.shape[-1] * torch.finfo(damped.dtype).eps * diagonal.amax(1)
    if bool(failed.any()) or bool((pivots.amin(1) <= least).any()):
        raise ValueError(
            f"a Kronecker factor + {damping:g} I is singular up to rounding or not positive "
            "definite: pass a larger damping"
        )
    return torch.cholesky_inverse(root).to(factors)


def logdet(block: Block, /) -> float:
    """Return the logarithm of the determinant, minus infinity for a singular block."""
    if isinstance(block, Kronecker):
        # log det(B (x) A) = K log det B + O log det A for each group.
        width, height = block.right.shape[-1], block.left.shape[-1]
        left, right = (_logdet(factors) for factors in (block.left, block.right))
        return float((width * left + height * right).sum())
    return float(_corrected(block).values.double().log().sum())


def _logdet(factors: Tensor) -> Tensor:
    return torch.linalg.slogdet(factors.double()).logabsdet


def determinant(block: Block, /) -> float:
    """Return the determinant of a positive semi-definite block."""
    return math.exp(logdet(block))


def squared_norm(block: Block, /) -> float:
    """Return the squared Frobenius norm of a block."""
    if isinstance(block, Kronecker):
        # |B (x) A|_F = |B|_F |A|_F for each group.
        left, right = (f.double().square().sum((1, 2)) for f in (block.left, block.right))
        return float(left @ right)
    return float(_corrected(block).values.double().square().sum())


def concatenated(batches: Sequence[Any], /) -> Any:
    """Return one batch with the examples of all batches."""
    leaves, rebuilt = zip(*(opened(batch, "batch") for batch in batches), strict=True)
    return rebuilt[0](
        torch.cat(parts) if all(isinstance(part, Tensor) for part in parts) else parts[0]
        for parts in zip(*leaves, strict=True)
    )


def _each(blocks: Blocks, fn: Callable[[Block], Block]) -> Blocks:
    return replace(blocks, blocks={name: fn(block) for name, block in blocks.items()})


def _factored(block: Block) -> Kronecker:
    if isinstance(block, Kronecker):
        return block
    raise TypeError(
        f"a block is a {type(block).__name__}, not a Kronecker product: use KFACLinearOperator, or "
        "exact damping"
    )


def _corrected(block: Block) -> Eigenbasis:
    if isinstance(block, Eigenbasis):
        return block
    raise TypeError(
        f"a block is a {type(block).__name__}, which has no Kronecker factors: hold its parameter "
        "fixed, by leaving it out of params"
    )
