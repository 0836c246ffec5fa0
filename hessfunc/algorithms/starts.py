"""Seeds of runs, and start vectors of eigensolvers."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from hessfunc.randomness import mixed
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.trees import Tree


def drawn_seed(space: Space, seed: int | None, /) -> int:
    """Return the seed, or, for None, a fresh seed that all ranks share."""
    return space.least(secrets.randbits(63)) if seed is None else seed


def lengths_of(space: Space, given: Tensor, /) -> Tensor:
    """Return the lengths of given start vectors, which are rows.

    Raises:
        ValueError: If a vector is not finite, or zero.
    """
    lengths = space.norms(given)
    if not bool(lengths.isfinite().all()):
        raise ValueError("start has entries that are NaN or infinite")
    if not bool((lengths > 0).all()):
        raise ValueError("start has a vector of zeros: each vector must be nonzero")
    return lengths


def of_starts(seed: int) -> int:
    """Return the seed of an eigensolver's random vectors, which differs from that of probes.

    With one seed for both, a probe would lie in the span of the eigenpairs, and a trace that is
    deflated by them would be biased.
    """
    return mixed(seed, -2)


def unit_start(space: Space, start: Tree | None, seed: int) -> Tensor:
    """Return the start vector as one row of unit length.

    Args:
        space: Space of the vectors.
        start: Tree like one vector, or None for a random vector.
        seed: Seed of the run.

    Raises:
        ValueError: If the start is a block of several vectors, is not finite, is too long for its
            dtype, or is zero.
    """
    dtype = rows_dtype(space)
    if start is None:
        row = space.probes([0], kind="normal", seed=of_starts(seed), dtype=dtype)
    else:
        row = space.rows(start, dtype=dtype)
        if len(row) != 1:
            raise ValueError(
                f"start is a block of {len(row)} vectors: pass a single vector, a tree with the "
                "structure of `like`"
            )
        length = float(space.norms(row))
        # A length beyond the range of the dtype would divide every entry to zero.
        if not length <= torch.finfo(dtype).max:
            raise ValueError(
                f"start has entries that are NaN or infinite, or a length above the range of "
                f"{dtype}: pass a finite vector, or start=None for a random one"
            )
        if length == 0:
            raise ValueError(
                "start is a vector of zeros: pass another vector, or start=None for a random one"
            )
    return row / space.norms(row).to(dtype)[:, None]
