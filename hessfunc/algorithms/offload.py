"""Rows that are kept on one device and worked on at another, where they come in pieces.

For a GPU the copies are queued in one stream of their own, beside that of the work: while a piece
is worked on, the next one is under way. As all copies from and to kept rows are in that stream,
one after the other, rows are read as they were last written. Nothing here makes the host wait,
but for `settled`. On other devices a copy is made at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hessfunc.spaces.space import Space, available_to

# Bytes of a piece, unless one row has more: 3 ms of a bus, against 10 us to queue a copy.
_PIECE = 2**27
# cudaHostRegisterPortable: for every GPU.
_PORTABLE = 1


def is_far(kept: torch.device, used: torch.device, /) -> bool:
    """Whether rows that are kept here must be brought to where they are used."""
    return kept != used


def home(space: Space, asked: torch.device | str | None, /) -> torch.device:
    """Where rows are kept: the device that was asked for, or that of the vectors."""
    # Of a tensor, so that it has an index, as those of all tensors.
    return torch.empty(0, device=asked or space.device).device


def room_beside(space: Space, dtype: torch.dtype, least: int, /) -> int:
    """The bytes for other vectors beside two pieces: together they take half of what is left.

    Args:
        space: of the vectors.
        dtype: of the rows that are kept elsewhere.
        least: what the other vectors take at the least.

    Raises:
        MemoryError: there is less.
    """
    working = torch.promote_types(dtype, torch.float32)
    pieces = 2 * max(_PIECE, space.widest * dtype.itemsize)
    if dtype != working:
        # The one that is worked on is converted.
        pieces += pieces // 2 * working.itemsize // dtype.itemsize
    limit = available_to(space) // 2
    if pieces + least > limit:
        raise MemoryError(
            f"two pieces of a basis that is kept elsewhere take {pieces / 2**30:.2f} GiB on "
            f"{space.device}, the vectors beside them {least / 2**30:.2f} GiB, and "
            f"{limit / 2**30:.2f} GiB may be used: take fewer pairs, smaller blocks, or more ranks"
        )
    return limit - pieces


def row_pieces(space: Space, kept: Tensor, /) -> tuple[Tensor, ...]:
    """The kept rows, a few at once: as many pieces on each rank, which sum once a piece."""
    return kept.split(max(1, _PIECE // max(1, space.widest * kept.itemsize)))


def column_pieces(kept: Tensor, /) -> tuple[Tensor, ...]:
    """The kept rows, a few columns at once."""
    return kept.split(max(1, _PIECE // (max(1, len(kept)) * kept.itemsize)), dim=1)


def workspace(kept: Tensor, shape: Sequence[int], used: torch.device, /) -> Tensor:
    """Memory for more rows beside the kept ones: page-locked, where a GPU uses them.

    Torch's own page-locked memory would be rounded up to a power of two, and never be given back.

    Raises:
        MemoryError: the driver does not lock as much.
    """
    if used.type != "cuda" or kept.device.type != "cpu":
        return kept.new_empty(shape)
    count = torch.Size(shape).numel() * kept.itemsize
    memory = np.empty(max(count, 1), dtype=np.uint8)
    address = memory.ctypes.data
    error = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, _PORTABLE))
    if error:
        raise MemoryError(
            f"the driver does not lock {count / 2**30:.2f} GiB of host memory for the basis "
            f"(cudaError {error}): take a smaller basis"
        )
    weakref.finalize(memory, _unlock, address, used).atexit = False
    # The tensor holds the array, which is finalised before its memory is freed.
    return torch.from_numpy(memory)[:count].view(kept.dtype).view(*shape)


def _unlock(address: int, used: torch.device) -> None:
    torch.cuda.synchronize(used)
    torch.cuda.cudart().cudaHostUnregister(address)


def is_ready(kept: Tensor, used: torch.device, /) -> bool:
    """Whether a GPU that uses the rows can copy them by itself."""
    return used.type != "cuda" or kept.is_cuda or kept.is_pinned()


def pieces(parts: Sequence[Tensor], used: torch.device, /) -> Iterator[Tensor]:
    """Copies of parts of the kept rows where they are used, while the next one is under way.

    They lie in two buffers in turn: a copy may be worked on in place, until the next is taken.

    Args:
        parts: each with rows that are contiguous.
        used: the device of the copies.
    """
    room = max(part.numel() for part in parts)
    buffers = [parts[0].new_empty(room, device=used) for _ in parts[:2]]

    def sent(i: int) -> Tensor:
        copy = buffers[i % 2][: parts[i].numel()].view(parts[i].shape)
        with _beside(used):
            _copy(copy, parts[i])
        return copy

    try:
        coming = sent(0)
        for i in range(len(parts)):
            here = coming
            _wait_for_copies(used)
            if i + 1 < len(parts):
                # Behind all work that was queued so far, the last on this buffer included.
                coming = sent(i + 1)
            yield here
    finally:
        # Whatever takes the memory of the buffers next is queued behind their copies.
        _wait_for_copies(used)


def brought(kept: Tensor, used: torch.device, /) -> Tensor:
    """The kept rows where they are used: themselves, if they are there."""
    if not is_far(kept.device, used):
        return kept
    (copy,) = pieces([kept], used)
    return copy


def written(kept: Tensor, rows: Tensor, /) -> None:
    """Write the rows where they are kept; for a GPU's it is only queued."""
    if not is_far(kept.device, rows.device):
        kept.copy_(rows)
        return
    rows = rows.to(kept.dtype)
    with _beside(rows.device):
        _copy(kept, rows)
    if rows.is_cuda:
        rows.record_stream(_stream_of_copies(rows.device))


def settled(kept: Tensor, used: torch.device, /) -> None:
    """Wait until all that was written is there, for the host to read."""
    if is_far(kept.device, used):
        _finish_copies(used)


@cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Inside, copies are queued beside the work of the device, behind what it has so far."""
    if device.type != "cuda":
        yield
        return
    stream = _stream_of_copies(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _wait_for_copies(device: torch.device) -> None:
    """What is queued next on the device waits for all copies that were queued so far."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream_of_copies(device))


def _finish_copies(device: torch.device) -> None:
    """The host waits for all copies that were queued so far."""
    if device.type == "cuda":
        _stream_of_copies(device).synchronize()


def _copy(target: Tensor, source: Tensor) -> None:
    queued = target.is_cuda or source.is_cuda
    if target.is_contiguous() and source.is_contiguous():
        target.copy_(source, non_blocking=queued)
        return
    # Torch would first gather what is not contiguous in ordinary memory, and wait for it.
    for mine, his in zip(target, source, strict=True):
        mine.copy_(his, non_blocking=queued)
