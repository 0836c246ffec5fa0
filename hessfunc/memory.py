"""Measure free memory, and the memory that a computation needs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hessfunc.trees import leaves, tree_map


def available_memory(device: torch.device, /) -> int:
    """Return the bytes that this process may still allocate on a device.

    On a CPU, the limit is the free memory of the machine or of the control group, divided by the
    number of local processes that ``torchrun`` started.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    free = _of_machine()
    if limit is not None and used is not None:
        free = max(0, min(free, limit - used))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _of_machine() -> int:
    try:
        with Path("/proc/meminfo").open() as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _control_group(entry: str) -> int | None:
    try:
        return int(Path("/sys/fs/cgroup", entry).read_text())
    except (OSError, ValueError):
        return None


class Footprint(TorchDispatchMode):
    """Dispatch mode that records the memory and the operations of a computation.

    Attributes:
        now: Bytes of the live tensors that were allocated inside the mode.
        peak: Largest value of ``now`` so far, in bytes.
        largest: Bytes of the largest single tensor.
        operations: Number of operations that returned new tensors; views do not count.
        entries: Number of entries that these operations wrote.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, int] = {}
        self.now = self.peak = self.largest = 0
        self.operations = self.entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_with_memory, (args, kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        if not func.is_view:
            self.operations += 1
            self.entries += sum(x.numel() for x in leaves(out) if isinstance(x, Tensor))
        for storage in _storages(out):
            # A view of an argument shares its storage, and allocates nothing.
            if storage._cdata not in given:
                self._hold(storage)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self.largest = max(self.largest, storage.nbytes())
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in leaves(tree):
        if not isinstance(tensor, Tensor) or tensor._is_zerotensor():
            continue
        if tensor.layout is torch.strided:
            yield tensor.untyped_storage()


def _with_memory(value: Any) -> Any:
    # The symbolic zeros of forward mode have no storage. Below a dispatch mode, kernels would
    # read it nevertheless.
    if isinstance(value, Tensor) and value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value


# Largest number of entries of an intermediate result that is computed in parts.
AT_ONCE = 2**24


def refuse_unless_fits(entries: int, like: Tensor, what: str, instead: str, /) -> None:
    """Raise MemoryError if a tensor with this many entries does not fit in free memory.

    Args:
        entries: Number of entries of the tensor.
        like: Tensor with the same dtype and device.
        what: Subject of the message, such as ``"the matrix"``.
        instead: Advice at the end of the message.
    """
    size, free = entries * like.element_size(), available_memory(like.device)
    if size > free:
        raise MemoryError(
            f"{what} takes {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free: "
            f"{instead}"
        )
