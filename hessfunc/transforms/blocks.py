"""One product -> a block of products: a loop, or vmap in chunks that fit in memory."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc.choices import current_choices
from hessfunc.memory import PeakMemory, available_memory
from hessfunc.transforms.kernels import explained, precise
from hessfunc.trees import Matvec, Space, Tree, batch_leaves, unchanged

__all__ = ["Chunks", "Curvature", "Product", "block_matvec"]

Curvature: TypeAlias = Callable[[Tree, Any], Matvec]
Product: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
ChunkSize: TypeAlias = int | Literal["auto"]

# Below this many vectors vmap costs more than it saves.
_SMALLEST_BLOCK = 4
# How often each way is timed, in turns; the first time also warms it up.
_TRIALS = 2


@dataclass(frozen=True)
class Chunks:
    """How many vectors go through one pass: a fixed number, or chosen by a trial and kept.

    Attributes:
        size: the chunk, 1 for a loop, or ``"auto"``.
        chosen: the chunk that was chosen for each number of vectors and shapes of a batch.
    """

    size: ChunkSize = "auto"
    chosen: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size != "auto" and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"chunk_size={self.size!r}: a positive integer, or 'auto'")


def block_matvec(
    product: Product,
    space: Space,
    point: Sequence[Tensor],
    batch: Any,
    *,
    chunks: Chunks,
) -> Matvec:
    """The matvec of a product of one vector.

    Args:
        product: the leaves of one vector -> the leaves of its product.
        space: of the vectors.
        point: the leaves of the parameters at which the product was made.
        batch: the batch for which it was made; its shapes tell similar products apart.
        chunks: how the block is cut.
    """
    refuse_if_changed = unchanged(space.names, point)
    of_batch = [tuple(x.shape) for x in batch_leaves(batch) if isinstance(x, Tensor)]

    def matvec(block: Tree) -> Tree:
        refuse_if_changed()
        tangents = [
            leaf.to(dtype)
            for leaf, dtype in zip(space.block_leaves(block), space.dtypes, strict=True)
        ]
        k = len(tangents[0])
        with (
            torch.no_grad(),
            precise(space.device),
            explained(space, batch),
            warnings.catch_warnings(),
        ):
            # Operations without a batching rule loop inside of vmap; trials see what that costs.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            if k == 1 or (chunks.size == "auto" and k < _SMALLEST_BLOCK):
                return space.tree(_loop(product, tangents))
            if chunks.size != "auto":
                return space.tree(_in_chunks(product, tangents, chunks.size)[0])
            key = f"{k} vectors of {space.n}, batch {', '.join(map(str, of_batch))}"
            recorded = current_choices()
            size = recorded.get(key) or chunks.chosen.get(key) or _fastest(product, tangents)
            found, size = _in_chunks(product, tangents, size)
            recorded[key] = chunks.chosen[key] = size
            return space.tree(found)

    return matvec


def _loop(product: Product, tangents: Sequence[Tensor]) -> list[Tensor]:
    if len(tangents[0]) == 1:
        return [out[None] for out in product([t[0] for t in tangents])]
    found = [torch.empty_like(t) for t in tangents]
    for i in range(len(tangents[0])):
        for target, out in zip(found, product([t[i] for t in tangents]), strict=True):
            target[i].copy_(out)
    return found


def _in_chunks(
    product: Product, tangents: Sequence[Tensor], size: int
) -> tuple[Sequence[Tensor], int]:
    """The products of a block, and the chunk size with which they fitted in memory."""
    if size == 1:
        return _loop(product, tangents), 1
    k = len(tangents[0])
    mapped = torch.vmap(product, randomness="same")
    try:
        if size >= k:
            return mapped(tangents), size
        found = [torch.empty_like(t) for t in tangents]
        for start in range(0, k, size):
            part = torch.vmap(product, randomness="same")(
                [t[start : start + size] for t in tangents]
            )
            for target, out in zip(found, part, strict=True):
                target[start : start + size].copy_(out)
        return found, size
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return _in_chunks(product, tangents, min(size, k) // 2)


def _fastest(product: Product, tangents: Sequence[Tensor]) -> int:
    """The chunk that takes the least time for each vector; 1 is a loop."""
    most = min(len(tangents[0]), _chunk_that_fits(product, tangents))
    # Large blocks may leave the caches, or memory that the allocator can reuse.
    sizes = {1} | {size for size in (_SMALLEST_BLOCK, most) if _SMALLEST_BLOCK <= size <= most}
    if len(sizes) == 1:
        return 1
    seconds = dict.fromkeys(sizes, math.inf)
    for _ in range(_TRIALS):
        for size in sizes:
            part = [t[:size] for t in tangents]
            try:
                spent = _seconds(partial(_in_chunks, product, part, size), part[0].device)
            except RuntimeError:
                # An operation without a batching rule: the loop needs none.
                continue
            seconds[size] = min(seconds[size], spent / size)
    return min(seconds, key=seconds.__getitem__)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _chunk_that_fits(product: Product, tangents: Sequence[Tensor]) -> int:
    # A CPU grants any allocation and the kernel kills the process later: predict. On CUDA
    # running out of memory is an exception, and the chunk is halved then.
    if tangents[0].device.type != "cpu":
        return len(tangents[0])
    with PeakMemory() as memory:
        _loop(product, [t[:1] for t in tangents])
    return max(1, available_memory(tangents[0].device) // 2 // max(1, memory.peak))
