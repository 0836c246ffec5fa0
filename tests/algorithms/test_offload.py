from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hessfunc.algorithms import offload as streamed
from hessfunc.algorithms.offload import (
    brought,
    column_pieces,
    is_ready,
    pieces,
    room_beside,
    row_pieces,
    workspace,
    written,
)
from hessfunc.memory import Footprint
from hessfunc.spaces.of import space_of
from tests.algorithms.far import copies_are_late, counted_copies, every_basis_is_far

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS = torch.arange(70.0, dtype=torch.float64).view(7, 10)
SPACE = space_of(torch.zeros(10, dtype=torch.float64))


def parts_of(kept: Tensor, axis: int) -> tuple[Tensor, ...]:
    return row_pieces(SPACE, kept) if axis == 0 else column_pieces(kept)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("piece", [1, 8, 160, 240, 2**20])
def test_pieces_are_the_parts_in_turn(axis: int, piece: int) -> None:
    with every_basis_is_far(piece):
        parts = parts_of(ROWS, axis)
        found = [part.clone() for part in pieces(parts, CPU)]
    assert all(part.numel() * 8 <= max(piece, 8 * (10, 7)[axis]) for part in found)
    assert torch.equal(torch.cat(found, dim=axis), ROWS)


def test_the_next_piece_is_under_way_and_two_are_there_at_most() -> None:
    kept = torch.ones(100, 1000)
    with counted_copies() as copies, Footprint() as memory:
        for i, _ in enumerate(pieces(kept.split(10), CPU)):
            assert len(copies) == min(i + 2, 10)
    assert memory.peak == 2 * 10 * 1000 * 4


@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_that_are_worked_on_are_written_back(axis: int) -> None:
    kept = ROWS.clone()
    with every_basis_is_far(160), copies_are_late():
        parts = parts_of(kept, axis)
        for target, part in zip(parts, pieces(parts, CPU), strict=True):
            part *= 2
            written(target, part)
    assert torch.equal(kept, 2 * ROWS)


def test_a_loop_that_ends_early_leaves_no_copy_behind() -> None:
    with every_basis_is_far(), copies_are_late():
        parts = pieces(ROWS.split(1), CPU)
        next(parts)
        parts.close()


def test_what_was_written_is_read_again_in_the_dtype_in_which_it_is_kept() -> None:
    kept = torch.zeros(7, 10, dtype=torch.bfloat16)
    with every_basis_is_far(), copies_are_late():
        written(kept[2:4], ROWS[2:4])
        again = brought(kept[1:4], CPU)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again[1:], ROWS[2:4].bfloat16())
    assert not again[0].any()


def test_rows_that_are_there_are_not_copied() -> None:
    assert brought(ROWS, CPU) is ROWS


class Stream:
    """What is queued in a stream, and what it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")

    @contextmanager
    def queued(self) -> Iterator[None]:
        self.log.append(f"{self.name} begins")
        yield
        self.log.append(f"{self.name} ends")


def test_copies_of_a_gpu_have_a_stream_that_waits_for_work_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    work = Stream("work", log)
    runtime = SimpleNamespace(
        Stream=lambda device: Stream("copies", log),
        current_stream=lambda device: work,
        stream=Stream.queued,
    )
    monkeypatch.setattr(torch, "cuda", runtime)
    monkeypatch.setattr(
        streamed, "_stream_of_copies", cache(streamed._stream_of_copies.__wrapped__)
    )
    with streamed._beside(GPU):
        log.append("copy")
    assert log == ["copies waits for work", "copies begins", "copy", "copies ends"]
    log.clear()
    streamed._wait_for_copies(GPU)
    streamed.settled(ROWS, GPU)
    assert log == ["work waits for copies", "host waits for copies"]
    log.clear()
    streamed.settled(ROWS, CPU)
    assert not log


class Driver:
    """What of CUDA's runtime locks memory."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.locked: dict[int, int] = {}
        self.found: list[bytes] = []

    def cudaHostRegister(self, address: int, count: int, flags: int) -> int:
        self.locked[address] = count
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.found.append(ctypes.string_at(address, self.locked.pop(address)))
        return 0


def test_memory_that_a_gpu_reads_is_locked_as_long_as_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, waited = Driver(), []
    runtime = SimpleNamespace(cudart=lambda: driver, synchronize=waited.append)
    monkeypatch.setattr(torch, "cuda", runtime)
    room = workspace(torch.empty(0, 3, dtype=torch.bfloat16), (5, 3), GPU)
    assert room.shape == (5, 3)
    assert room.dtype == torch.bfloat16
    assert driver.locked == {room.data_ptr(): 30}
    room.fill_(1.5)
    part, content = room[1:3], room.view(torch.uint8).numpy().tobytes()
    del room
    gc.collect()
    assert driver.locked
    del part
    gc.collect()
    assert not driver.locked
    assert driver.found == [content]
    assert waited == [GPU]


def test_memory_that_is_not_locked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(cudart=lambda: Driver(error=2)))
    with pytest.raises(MemoryError, match=r"lock 0.00 GiB of host memory .*cudaError 2"):
        workspace(ROWS[:0], (5, 10), GPU)


def test_memory_that_is_not_locked_is_no_memory_for_a_gpu() -> None:
    assert is_ready(ROWS, CPU)
    assert not is_ready(ROWS, GPU)


def test_two_pieces_and_other_vectors_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_PIECE", 100)
    monkeypatch.setattr(streamed, "available_to", lambda *_: 2 * 300)
    assert room_beside(SPACE, torch.float64, 100) == 100
    with pytest.raises(MemoryError, match="two pieces of a basis that is kept elsewhere"):
        room_beside(SPACE, torch.float64, 101)
    with pytest.raises(MemoryError, match="two pieces"):
        # One vector is more than a piece.
        room_beside(space_of(torch.zeros(40)), torch.float32, 0)
