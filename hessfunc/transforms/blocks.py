"""One product -> a block of products: a loop, or vmap in chunks that fit in memory."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc.choices import current_choices
from hessfunc.memory import PeakMemory, available_memory
from hessfunc.transforms.kernels import explanation, precise, refuse_autocast
from hessfunc.trees import Matvec, Space, Tree, batch_leaves, unchanged

__all__ = ["Chunks", "Curvature", "Product", "block_matvec", "guarding"]

Curvature: TypeAlias = Callable[[Tree, Any], Matvec]
Product: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
ChunkSize: TypeAlias = int | Literal["auto"]

# Below this many vectors vmap costs more than it saves.
_SMALLEST_BLOCK = 4
# How often each way is timed, in turns; the first time also warms it up.
_TRIALS = 2
# What glibc gives back to the system at once, and gets from it anew, page by page: tensors above
# it are several times slower to write.
_LARGEST_ON_CPU = 2**25


_guards: ContextVar[list[Callable[[], None]]] = ContextVar("guards")


@contextmanager
def guarding(checks: list[Callable[[], None]], /) -> Iterator[None]:
    """Inside, the checks that products make of their parameters are added to a list."""
    token = _guards.set(checks)
    try:
        yield
    finally:
        _guards.reset(token)


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
    surroundings = precise if space.device.type == "cuda" else nullcontext

    def products(tangents: Sequence[Tensor]) -> Iterable[Tensor]:
        k = tangents[0].shape[0]
        if space.distributed:
            return space.stacked([product([t[i] for t in tangents]) for i in range(k)])
        if k == 1:
            return [out.unsqueeze(0) for out in product([t.squeeze(0) for t in tangents])]
        if chunks.size != "auto":
            return _in_chunks(product, tangents, chunks.size)[0]
        if k < _SMALLEST_BLOCK:
            return _in_chunks(product, tangents, 1)[0]
        key = f"{k} vectors of {space.n}, batch {', '.join(map(str, of_batch))}"
        recorded = current_choices()
        size = recorded.get(key) or chunks.chosen.get(key)
        if size is None:
            found, size = _by_trial(product, tangents)
        else:
            found, size = _in_chunks(product, tangents, size)
        recorded[key] = chunks.chosen[key] = size
        return found

    # The way of one vector is short: on a small net it takes as long as the product.
    def matvec(block: Tree) -> Tree:
        refuse_autocast(space.device)
        refuse_if_changed()
        _guards.get([]).append(refuse_if_changed)
        tangents = space.block_leaves(block)
        if any(t.dtype is not dtype for t, dtype in zip(tangents, space.dtypes, strict=True)):
            tangents = [t.to(dtype) for t, dtype in zip(tangents, space.dtypes, strict=True)]
        try:
            with torch.no_grad(), surroundings(space.device):
                return space.tree(products(tangents))
        except RuntimeError as error:
            if (clearer := explanation(error, space, batch)) is not None:
                raise clearer from error
            raise

    def outside_of_inference_mode(block: Tree) -> Tree:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return matvec(block)
        return matvec(block)

    return outside_of_inference_mode


def _in_chunks(
    product: Product, tangents: Sequence[Tensor], size: int
) -> tuple[Sequence[Tensor], int]:
    """The products of a block, and the chunk size with which they fitted in memory."""
    k = len(tangents[0])
    if 1 < size >= k:
        try:
            return _mapped(product, tangents), size
        except torch.OutOfMemoryError:
            size = k // 2
        torch.cuda.empty_cache()
    pieces = _Pieces(product, tangents)
    while pieces.done < k:
        try:
            pieces.take(min(size, k - pieces.done))
            continue
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        torch.cuda.empty_cache()
        size //= 2
    return pieces.found, size


def _mapped(product: Product, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
    with warnings.catch_warnings():
        # Operations without a batching rule loop inside of vmap; trials see what that costs.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(product, randomness="same")(tangents)


class _Pieces:
    """The products of a block, made piece by piece.

    Attributes:
        found: the leaves of the products.
        done: how many vectors have been multiplied.
    """

    def __init__(self, product: Product, tangents: Sequence[Tensor]) -> None:
        self.product = product
        self.tangents = tangents
        self.found = [torch.empty_like(t) for t in tangents]
        self.done = 0

    def take(self, size: int) -> None:
        """Multiply the next vectors, or the last ones again where fewer are left."""
        start = min(self.done, len(self.tangents[0]) - size)
        end = start + size
        if size == 1:
            part = self.product([t[start] for t in self.tangents])
        else:
            part = _mapped(self.product, [t[start:end] for t in self.tangents])
        for target, out in zip(self.found, part, strict=True):
            # One product has no probe axis, and is broadcast.
            target[start:end].copy_(out)
        self.done = max(self.done, end)


def _by_trial(product: Product, tangents: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    """The products of a block, and the chunk that took the least time for each vector.

    The trial's own products are part of the result.
    """
    k, device = len(tangents[0]), tangents[0].device
    pieces = _Pieces(product, tangents)
    most = _chunk_that_fits(pieces)
    seconds: dict[int, float] = {}

    def race(*sizes: int) -> None:
        for size in sizes * _TRIALS:
            try:
                spent = _seconds(partial(pieces.take, size), device) / size
            except RuntimeError:
                # An operation without a batching rule, or no memory: the loop needs neither.
                if size == 1:
                    raise
                continue
            seconds[size] = min(spent, seconds.get(size, math.inf))

    if most >= _SMALLEST_BLOCK:
        race(1, _SMALLEST_BLOCK)
        # Larger blocks may leave the caches, or save calls.
        larger = -(-k // -(-k // most))
        if seconds.get(_SMALLEST_BLOCK, math.inf) < seconds[1] and larger > _SMALLEST_BLOCK:
            race(larger)
    size = min(seconds, key=seconds.__getitem__, default=1)
    while pieces.done < k:
        pieces.take(min(size, k - pieces.done))
    return pieces.found, size


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _chunk_that_fits(pieces: _Pieces) -> int:
    """The most vectors that should go through one pass, by what the first one takes."""
    device = pieces.found[0].device
    with PeakMemory() as memory:
        pieces.take(1)
    # A CPU grants any allocation and the kernel kills the process later: predict. On CUDA
    # running out of memory is an exception, and the chunk is halved then.
    if device.type != "cpu":
        return len(pieces.found[0])
    in_memory = available_memory(device) // 2 // max(1, memory.peak)
    return max(1, min(len(pieces.found[0]), in_memory, _LARGEST_ON_CPU // max(1, memory.largest)))
