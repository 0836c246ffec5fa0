"""The peak of memory of one alternative, in a process that does nothing else.

    python -m bench.speed.peak memory/gpt 'PyHessian, graph kept'

What a first call alone takes, such as modules that are imported then, is not counted.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from bench import resident
from bench.speed.device import device, wait

_MINUTES = 10


def peak_of(cell: str, alternative: str) -> int:
    """In bytes: of preparing it and one call, the result included, above the net and the batch.

    Raises:
        RuntimeError: the process has ended with an error, of which the last line is told.
    """
    if device().type == "cuda":
        # Torch counts the peak exactly, whatever the process did before.
        return _measured(cell, alternative)
    # Tensors that are freed go back to the system at once, and are not found again in the heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", __name__, cell, alternative]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60 * _MINUTES
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(last)
    return int(done.stdout)


def peak_above(call: Callable[[], object]) -> int:
    """The peak of memory in a call, its result included, above what was there before."""
    return _peak_on_gpu(call) if device().type == "cuda" else resident.peak_above(call)


def _peak_on_gpu(call: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device())
    before = torch.cuda.memory_allocated(device())
    kept = call()
    wait()
    peak = torch.cuda.max_memory_allocated(device())
    del kept
    return peak - before


def _measured(cell: str, alternative: str) -> int:
    from bench.speed import memory

    return memory.peak(*cell.split("/"), alternative)


if __name__ == "__main__":
    print(_measured(*sys.argv[1:]))
