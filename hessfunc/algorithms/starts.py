"""Seeds of runs, and start vectors of eigensolvers."""

from __future__ import annotations

import math
import secrets

from torch import Tensor

from hessfunc.randomness import mixed
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.trees import Tree


def drawn_seed(space: Space, seed: int | None, /) -> int:
    """Return the seed, or a fresh one that is the same on all ranks."""
    return space.least(secrets.randbits(63)) if seed is None else seed


def of_starts(seed: int) -> int:
    """The seed of an eigensolver's vectors: other ones than the probes of estimates.

    A trace beside eigenpairs would else be biased, as a probe lies in the span of the pairs.
    """
    return mixed(seed, -2)


def unit_start(space: Space, start: Tree | None, seed: int) -> Tensor:
    """One row of unit length: the given tree, or a random vector."""
    dtype = rows_dtype(space)
    if start is None:
        row = space.probes([0], kind="normal", seed=of_starts(seed), dtype=dtype)
    else:
        row = space.rows(start, dtype=dtype)
        if len(row) != 1:
            raise ValueError(f"start is a block of {len(row)} vectors: one is due")
        length = float(space.norms(row))
        if not math.isfinite(length):
            raise ValueError("start has entries that are NaN or infinite")
        if length == 0:
            raise ValueError("start is a vector of zeros")
    return row / space.norms(row).to(dtype)[:, None]
