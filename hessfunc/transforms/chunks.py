"""Products with vector blocks, by a loop or by vmap in chunks that fit in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd import explanation, precise, refuse_autocast
from hessfunc.autograd.constant_matrix import Product, of_vectors, refusing_gradients
from hessfunc.autograd.functorch import last_product, transforming
from hessfunc.changes import unchanged
from hessfunc.containers import batch_leaves
from hessfunc.fingerprints import checksum, of_batches, with_fingerprint
from hessfunc.memory import Footprint
from hessfunc.options.door import memory_limit_now
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree

Curvature: TypeAlias = Callable[[Tree, Any], Matvec]
ChunkSize: TypeAlias = int | None

# Smallest number of vectors for which vmap is faster than a loop.
_SMALLEST_BLOCK = 4
# Largest mean output of an operation, in entries, for which a block goes through vmap. Smaller
# operations are dominated by call overhead, which vmap shares among vectors. Larger operations are
# dominated by arithmetic, and vmap only moves their data out of the caches. Measured over 13 nets,
# the rule stays within 8 % of the fastest of a loop, chunks of 4 and the whole block
# (`python -m bench.speed 'rule/*'`).
_HESSIAN_ENTRIES = 2**15
GAUSS_NEWTON_ENTRIES = 2**16
# An accelerator needs about a million entries to be fully used.
_ACCELERATOR_ENTRIES = 2**20
# Largest memory of a chunk on a CPU, in bytes. It is a constant, because free memory varies.
_CHUNK_BYTES = 2**30
# Largest allocation on a CPU, in bytes. glibc returns larger allocations to the system when they
# are freed and maps each new one page by page, so writing to them is several times slower.
_LARGEST_ON_CPU = 2**25
_WITHOUT_GRAPH = (
    "a product with a curvature matrix keeps no graph of the parameters, the batch and the tensors "
    "in the loss, so that their gradient would silently leave the product out: make the curvature "
    "with `differentiable=True`, or take the product under `torch.no_grad()`"
)
_guards: ContextVar[list[Callable[[], None]]] = ContextVar("guards")


@contextmanager
def guarding(checks: list[Callable[[], None]], /) -> Iterator[None]:
    """Context manager that collects the checks that products run on their parameters in a list."""
    token = _guards.set(checks)
    try:
        yield
    finally:
        _guards.reset(token)


@dataclass
class Chunks:
    """Number of vectors in one pass.

    Attributes:
        size: Number of vectors in a chunk; 1 is a loop, None the rule of `chunk_by_rule`.
        entries: Largest mean output of an operation for which the rule chooses vmap on a CPU.
        chosen: Chunk sizes that the rule chose, by number of vectors and shapes of the batch.
    """

    size: ChunkSize = None
    entries: int = _HESSIAN_ENTRIES
    chosen: dict[Hashable, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"chunk_size={self.size}: it must be at least 1, or None for the rule")


def block_matvec(
    product: Product,
    space: Space,
    point: Sequence[Tensor],
    batch: Any,
    *,
    chunks: Chunks,
    copies: Sequence[Tensor] | None = None,
    refuse_if_changed: Callable[[], None] | None = None,
    constants: Sequence[Tensor] = (),
) -> Matvec:
    """Return the matvec of a function that multiplies one vector.

    Args:
        product: Function from the leaves of one vector to the leaves of its product.
        space: Space of the vectors.
        point: Leaves of the parameters, which must not change.
        batch: Batch of the product. Its shapes distinguish products for the chunk size.
        chunks: Division of the block into chunks.
        copies: Leaves at which the product was made, if they are copies of ``point``.
        refuse_if_changed: Function that raises if something else that the product reads has
            changed.
        constants: Tensors that require a gradient, of which the products carry no graph. Their
            gradient is refused.
    """
    refuse_if_moved = unchanged(space.names, point)
    shapes = tuple(x.shape for x in batch_leaves(batch) if isinstance(x, Tensor))
    surroundings = precise if space.device.type == "cuda" else nullcontext

    def products(tangents: Sequence[Tensor], final: Product) -> Iterable[Tensor]:
        k = tangents[0].shape[0]
        if space.distributed:
            return space.stacked([product([t[i] for t in tangents]) for i in range(k)])
        if k == 1:
            return [out.unsqueeze(0) for out in final([t.squeeze(0) for t in tangents])]
        pieces = _Pieces(product, tangents, final)
        if chunks.size is not None:
            return _in_chunks(pieces, chunks.size)[0]
        if k < _SMALLEST_BLOCK:
            return _in_chunks(pieces, 1)[0]
        key = (k, space.n, shapes, memory_limit_now())
        size = chunks.chosen.get(key)
        if size is None:
            # All ranks of a model with collectives must divide the block alike.
            size = space.least(chunk_by_rule(pieces, chunks.entries))
            if size == 1:
                leaves, chunks.chosen[key] = pieces.completed(1)
                return leaves
            # Free the block of results before the chunks allocate another one.
            pieces = _Pieces(product, tangents, final)
        leaves, chunks.chosen[key] = _by_vmap_or_loop(pieces, size)
        return leaves

    def plain(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad(), surroundings(space.device):
            return list(products(tangents, product))

    def with_graph(tangents: Sequence[Tensor]) -> Iterable[Tensor]:
        if transforming() or _needs_graph(tangents):
            outs: Sequence[Tensor] = of_vectors(plain, tangents)
        else:
            outs = plain(tangents)
        return refusing_gradients(constants, outs, _WITHOUT_GRAPH) if constants else outs

    # This function is kept short: on a small net, its overhead is as long as a product.
    def multiplied(block: Tree, final: Product) -> Tree:
        refuse_autocast(space.device)
        refuse_if_moved()
        _guards.get([]).append(refuse_if_moved)
        if refuse_if_changed is not None:
            refuse_if_changed()
            _guards.get([]).append(refuse_if_changed)
        tangents = space.block_leaves(block)
        if any(t.dtype is not dtype for t, dtype in zip(tangents, space.dtypes, strict=True)):
            tangents = [t.to(dtype) for t, dtype in zip(tangents, space.dtypes, strict=True)]
        try:
            if torch.is_grad_enabled() and (constants or transforming() or _needs_graph(tangents)):
                outs = space.block(with_graph(tangents))
            else:
                with torch.no_grad(), surroundings(space.device):
                    outs = space.block(products(tangents, final))
        except RuntimeError as error:
            if (clearer := explanation(error, space, batch)) is not None:
                raise clearer from error
            raise
        if refuse_if_changed is not None:
            # Another thread may have written while the products were computed.
            refuse_if_changed()
        return outs

    def outside_of_inference_mode(block: Tree, final: Product) -> Tree:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return multiplied(block, final)
        return multiplied(block, final)

    def freeing(vector: Sequence[Tensor]) -> Sequence[Tensor]:
        with last_product():
            return product(vector)

    def matvec(block: Tree) -> Tree:
        return outside_of_inference_mode(block, product)

    vars(matvec)["once"] = partial(outside_of_inference_mode, final=freeing)
    return with_fingerprint(
        matvec,
        lambda: {
            "parameters": checksum(point if copies is None else copies),
            "batches": of_batches([batch]),
        },
    )


def used_once(matvec: Matvec, /) -> Matvec:
    """Return a matvec for a single call, which frees the graph of one batch while it multiplies.

    Blocks that go through vmap keep the graph. Products of other matvecs are unchanged.
    """
    once: Matvec = getattr(matvec, "once", matvec)
    return once


def _needs_graph(tangents: Sequence[Tensor]) -> bool:
    return any(t.requires_grad for t in tangents)


def _by_vmap_or_loop(pieces: _Pieces, size: int) -> tuple[Sequence[Tensor], int]:
    """Multiply a block in chunks, or by a loop if an operation has no batching rule."""
    try:
        return _in_chunks(pieces, size)
    except RuntimeError:
        if size == 1:
            raise
        # If the product itself fails, the loop raises its error again.
        return _in_chunks(replace(pieces, done=0), 1)


def _in_chunks(pieces: _Pieces, size: int) -> tuple[Sequence[Tensor], int]:
    """Return the products of a block, and the chunk size with which they fitted in memory."""
    k = len(pieces.tangents[0])
    if 1 < size >= k:
        try:
            return _mapped(pieces.product, pieces.tangents), size
        except torch.OutOfMemoryError:
            size = k // 2
        torch.cuda.empty_cache()
    return pieces.completed(size)


def _mapped(product: Product, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
    with warnings.catch_warnings():
        # Operations without a batching rule loop inside vmap, which warns about it.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(product, randomness="same")(tangents)


@dataclass
class _Pieces:
    """Products of a block, computed piece by piece.

    Attributes:
        product: Function that multiplies one vector.
        tangents: Leaves of the block.
        final: Function that multiplies the last vector of a loop; it may free the graph.
        done: Number of vectors that have been multiplied.
    """

    product: Product
    tangents: Sequence[Tensor]
    final: Product
    done: int = 0

    @cached_property
    def found(self) -> list[Tensor]:
        """Leaves of the products."""
        return [torch.empty_like(t) for t in self.tangents]

    def take(self, size: int) -> None:
        """Multiply the next ``size`` vectors; if fewer remain, repeat some earlier ones."""
        start = min(self.done, len(self.tangents[0]) - size)
        end = start + size
        if size == 1:
            product = self.final if end == len(self.tangents[0]) else self.product
            part = product([t[start] for t in self.tangents])
        else:
            part = _mapped(self.product, [t[start:end] for t in self.tangents])
        for target, out in zip(self.found, part, strict=True):
            # A single product has no probe axis; `copy_` broadcasts it.
            target[start:end].copy_(out)
        self.done = max(self.done, end)

    def completed(self, size: int) -> tuple[Sequence[Tensor], int]:
        """Return all products, and the chunk size with which they fitted in memory."""
        k = len(self.tangents[0])
        while self.done < k:
            try:
                self.take(min(size, k - self.done))
                continue
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            torch.cuda.empty_cache()
            size //= 2
        return self.found, size


def chunk_by_rule(pieces: _Pieces, entries: int) -> int:
    """Return the chunk size of a block, from the sizes of the operations of its first product.

    If operations write at most ``entries`` entries on average, the whole block goes through vmap,
    on a CPU in equal chunks of at most 1 GiB, or a quarter of `memory_limit`. Otherwise a loop
    multiplies it. The choice depends neither on timings nor on other processes, so that every run
    takes the same path.

    Args:
        pieces: Block to multiply. Its first product is computed here, and a loop can resume
            from it.
        entries: Largest mean output of an operation on a CPU.
    """
    k, device = len(pieces.tangents[0]), pieces.tangents[0].device
    with Footprint() as of_one:
        pieces.take(1)
    on_cpu = device.type == "cpu"
    if of_one.entries > (entries if on_cpu else _ACCELERATOR_ENTRIES) * max(1, of_one.operations):
        return 1
    # An accelerator raises an error when it is out of memory, and the chunk is then halved. On a
    # CPU, any allocation succeeds and the kernel kills the process later.
    most = k
    if (limit := memory_limit_now()) is not None:
        most = min(most, int(limit) // 4 // max(1, of_one.peak))
    if on_cpu:
        most = min(
            most, _CHUNK_BYTES // max(1, of_one.peak), _LARGEST_ON_CPU // max(1, of_one.largest)
        )
    return -(-k // -(-k // most)) if most >= _SMALLEST_BLOCK else 1
