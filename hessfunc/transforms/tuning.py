"""Measurement of the fastest chunk size."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import torch

from hessfunc.memory import Footprint, available_memory
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec, Tree

# The first round is a warm-up. The minimum of the others counts, because noise only adds time.
_ROUNDS = 4


class _Family(Protocol):
    def __call__(self, *, chunk_size: int) -> Curvature: ...


@validated
def tune(
    family: _Family,
    params: Tree,
    batch: Any,
    /,
    *,
    vectors: int = 16,
) -> int:
    """Time products in chunks of 1, 4, 16, ... vectors, and return the fastest chunk size.

    By default, curvature functions choose their chunk size by a rule that depends on sizes but not
    on timings, so that a run can be repeated bit by bit. A tuned chunk size is at least as fast on
    the machine on which it was measured. Pass the same number again to repeat a run::

        family = functools.partial(hf.hvp, loss)
        chunk_size = hf.tune(family, params, batch, vectors=16)
        matvec = family(chunk_size=chunk_size)(params, batch)

    Args:
        family: Function of ``chunk_size=`` that returns a curvature function.
        params: Parameters for the timed products.
        batch: Batch for the timed products.
        vectors: Number of vectors in the blocks that will be multiplied.

    Returns:
        Chunk size between 1 (a loop) and ``vectors``.

    Raises:
        ValueError: If ``vectors`` is not positive.

    Cost: four products of ``vectors`` vectors for each size.
    """
    if vectors < 1:
        raise ValueError(f"vectors={vectors}: it must be at least 1")
    space = space_of(params)
    rows = space.probes(range(vectors), kind="normal", seed=0)
    block = space.unravel(rows)
    loop = family(chunk_size=1)(params, batch)
    with Footprint() as of_one:
        loop(space.unravel(rows[:1]))
    most = max(1, available_memory(space.device) // 2 // max(1, of_one.peak))
    sizes = sorted({1, vectors, *(4**i for i in range(1, 16) if 4**i < vectors)})
    matvecs = {1: loop} | {
        size: family(chunk_size=size)(params, batch) for size in sizes if 1 < size <= most
    }
    seconds = dict.fromkeys(matvecs, math.inf)
    for turn in range(_ROUNDS):
        for size, matvec in list(matvecs.items()):
            try:
                spent = _seconds(matvec, block, space.device)
            except RuntimeError:
                # An operation has no batching rule, or the accelerator is out of memory.
                if size == 1:
                    raise
                del matvecs[size], seconds[size]
                continue
            if turn:
                seconds[size] = min(seconds[size], spent)
    return min(seconds, key=seconds.__getitem__)


def _seconds(matvec: Matvec, block: Tree, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    matvec(block)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
