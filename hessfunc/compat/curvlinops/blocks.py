"""Arithmetic of Kronecker-factored diagonal blocks: scaled and inverted factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hessfunc.kronecker.block import Block
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.composite_blocks import Joint, Permuted
from hessfunc.kronecker.factored_blocks import Dense, DiagonalBlock, Eigenbasis, Kronecker


def is_bias(block: Block, /) -> bool:
    """Return whether the block belongs to a bias, whose input factor is the number 1."""
    return len(block.shape) == 1


def scaled(blocks: Blocks, /, *, left: float, right: float) -> Blocks:
    """Return the blocks with scaled factors; the number 1 of a bias stays.

    Args:
        blocks: Blocks of any kind.
        left: Scale of output factors, and of blocks without input factors.
        right: Scale of input factors.
    """

    def of_block(block: Block) -> Block:
        match block:
            case Kronecker():
                inputs = block.right if is_bias(block) else right * block.right
                return replace(block, left=left * block.left, right=inputs)
            case Eigenbasis() | DiagonalBlock():
                return replace(block, values=left * block.values)
            case Dense():
                return replace(block, matrix=left * block.matrix)
            case Permuted() | Joint():
                return replace(block, inner=of_block(block.inner))
            case _:
                raise TypeError(
                    f"a {type(block).__name__} has no scale: leave its parameter out of params"
                )

    return replace(blocks, blocks={name: of_block(block) for name, block in blocks.items()})


def inverse(blocks: Blocks, dampings: Callable[[str], tuple[float, float]], /) -> Blocks:
    """Return the blocks with the inverses of the damped factors.

        (A + a I)^-1 (x) (B + b I)^-1

    Args:
        blocks: Blocks with Kronecker factors.
        dampings: Function of the name of a parameter that returns a and b. The number 1 of a bias
            is not damped.

    Raises:
        ValueError: If a damped factor is not positive definite.
        TypeError: If a block has no Kronecker factors.
    """

    def of_block(block: Block, a: float, b: float) -> Block:
        match block:
            case Kronecker():
                right = block.right if is_bias(block) else _damped_inverse(block.right, a)
                return replace(block, left=_damped_inverse(block.left, b), right=right)
            case Permuted() | Joint():
                return replace(block, inner=of_block(block.inner, a, b))
            case _:
                raise TypeError(
                    f"a {type(block).__name__} has no Kronecker factors: pass "
                    "use_exact_damping=True, or leave its parameter out of params"
                )

    inverted = {name: of_block(block, *dampings(name)) for name, block in blocks.items()}
    return replace(blocks, blocks=inverted)


def _damped_inverse(factors: Tensor, damping: float) -> Tensor:
    """Return the inverses of matrices ``(G, n, n)``, or of diagonal ones ``(G, n)``."""
    # In float64, because the factors are often nearly singular.
    wide = factors.double()
    if factors.dim() == 2:
        damped = torch.diag_embed(wide + damping)
    else:
        damped = wide + damping * torch.eye(factors.shape[-1], dtype=wide.dtype, device=wide.device)
    root, failed = torch.linalg.cholesky_ex(damped)
    # The squared diagonal of the root has the pivots, at most as large as the diagonal.
    pivots, diagonal = (m.diagonal(dim1=1, dim2=2) for m in (root.square(), damped))
    least = damped.shape[-1] * torch.finfo(damped.dtype).eps * diagonal.amax(1)
    if bool(failed.any()) or bool((pivots.amin(1) <= least).any()):
        raise ValueError(
            f"a Kronecker factor + {damping:g} I is singular up to rounding or not positive "
            "definite: pass a larger damping"
        )
    if factors.dim() == 2:
        return (1 / diagonal).to(factors)
    return torch.cholesky_inverse(root).to(factors)
