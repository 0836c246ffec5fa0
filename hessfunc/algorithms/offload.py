"""Rows that are kept on one device and used on another, to which they are copied in pieces.

On a GPU the copies have a stream of their own, beside the stream of the computation: while one
piece is in use, the next is copied. All copies from and to kept rows are in that one stream, in
order, so that rows are read as they were last written. Only `settled` makes the host wait. On other
devices a copy is immediate.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hessfunc.numerics import indexed
from hessfunc.spaces.space import Space, available_to

# Bytes of a piece, unless one row is larger: 3 ms of transfer, against 10 us to queue a copy.
_PIECE = 2**27
# cudaHostRegisterPortable: the memory is page-locked for every GPU.
_PORTABLE = 1


def is_far(kept: torch.device, used: torch.device, /) -> bool:
    """Return whether rows must be copied from the device of storage to the device of use."""
    return kept != used


def home(space: Space, asked: torch.device | str | None, /) -> torch.device:
    """Return the device on which rows are kept: the requested one, or that of the vectors."""
    return indexed(asked or space.device)


def room_beside(space: Space, dtype: torch.dtype, least: int, /) -> int:
    """Return the bytes for other vectors beside two pieces, within half of the available memory.

    Args:
        space: Space of the vectors.
        dtype: Dtype of the rows on the other device.
        least: Bytes that the other vectors need.

    Raises:
        MemoryError: If less than ``least`` remains.
    """
    working = torch.promote_types(dtype, torch.float32)
    pieces = 2 * max(_PIECE, space.widest * dtype.itemsize)
    if dtype != working:
        # The piece in use is converted to the working dtype.
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
    """Return pieces of a few rows, equally many on each rank, since ranks reduce once a piece."""
    return kept.split(max(1, _PIECE // max(1, space.widest * kept.itemsize)))


def column_pieces(kept: Tensor, /) -> tuple[Tensor, ...]:
    """Return pieces of a few columns of the kept rows."""
    return kept.split(max(1, _PIECE // (max(1, len(kept)) * kept.itemsize)), dim=1)


def workspace(kept: Tensor, shape: Sequence[int], used: torch.device, /) -> Tensor:
    """Return memory for more rows like the kept ones, page-locked if a GPU uses them.

    The page-locked memory of torch would be rounded up to a power of two, and never be freed.

    Raises:
        MemoryError: If the driver cannot page-lock the memory.
    """
    if used.type != "cuda" or kept.device.type != "cpu":
        return kept.new_empty(shape)
    count = torch.Size(shape).numel() * kept.itemsize
    memory = np.empty(max(count, 1), dtype=np.uint8)
    address = memory.ctypes.data
    error = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, _PORTABLE))
    if error:
        raise MemoryError(
            f"the CUDA driver cannot lock {count / 2**30:.2f} GiB of host memory for the basis "
            f"(cudaError {error}): take a smaller basis"
        )
    weakref.finalize(memory, _unlock, address, used).atexit = False
    # The tensor holds the array, which is finalised before its memory is freed.
    return torch.from_numpy(memory)[:count].view(kept.dtype).view(*shape)


def _unlock(address: int, used: torch.device) -> None:
    torch.cuda.synchronize(used)
    torch.cuda.cudart().cudaHostUnregister(address)


def is_ready(kept: Tensor, used: torch.device, /) -> bool:
    """Return whether the device of use can copy the rows without the help of the host."""
    return used.type != "cuda" or kept.is_cuda or kept.is_pinned()


def pieces(parts: Sequence[Tensor], used: torch.device, /) -> Iterator[Tensor]:
    """Yield copies of parts of the kept rows on the device of use, while the next one is copied.

    The copies lie alternately in two buffers. A copy may be overwritten until the next is taken.

    Args:
        parts: Parts of the kept rows, each with contiguous rows.
        used: Device of the copies.
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
                # The copy is queued behind all work so far, including the last use of its buffer.
                coming = sent(i + 1)
            yield here
    finally:
        # The next user of the memory of the buffers is queued behind their copies.
        _wait_for_copies(used)


def brought(kept: Tensor, used: torch.device, /) -> Tensor:
    """Return the kept rows on the device of use, copied only from another device."""
    if not is_far(kept.device, used):
        return kept
    (copy,) = pieces([kept], used)
    return copy


def written(kept: Tensor, rows: Tensor, /) -> None:
    """Write rows to the memory of kept ones; from a GPU the copy is only queued."""
    if not is_far(kept.device, rows.device):
        kept.copy_(rows)
        return
    rows = rows.to(kept.dtype)
    with _beside(rows.device):
        _copy(kept, rows)
    if rows.is_cuda:
        rows.record_stream(_stream_of_copies(rows.device))


def settled(kept: Tensor, used: torch.device, /) -> None:
    """Wait until all rows are written, so that the host can read them."""
    if is_far(kept.device, used):
        _finish_copies(used)


@cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Queue the copies inside in their own stream, behind the work of the device so far."""
    if device.type != "cuda":
        yield
        return
    stream = _stream_of_copies(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _wait_for_copies(device: torch.device) -> None:
    """Make the next work on the device wait for all copies that were queued so far."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream_of_copies(device))


def _finish_copies(device: torch.device) -> None:
    """Make the host wait for all copies that were queued so far."""
    if device.type == "cuda":
        _stream_of_copies(device).synchronize()


def _copy(target: Tensor, source: Tensor) -> None:
    queued = target.is_cuda or source.is_cuda
    if target.is_contiguous() and source.is_contiguous():
        target.copy_(source, non_blocking=queued)
        return
    # Torch would first gather a tensor that is not contiguous in pageable memory, and wait for it.
    for mine, his in zip(target, source, strict=True):
        mine.copy_(his, non_blocking=queued)
