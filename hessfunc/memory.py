"""Limit and measure free memory, and the memory that a computation needs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hessfunc.options.door import limited, memory_limit_now, validated
from hessfunc.stored import Stored
from hessfunc.trees import leaves, tree_map


@validated
def memory_limit(memory: float, /) -> AbstractContextManager[None]:
    """Return a context manager in which hessfunc takes at most so much memory.

    The limit counts all tensors that hessfunc allocates inside, but neither the parameters nor the
    batches that it is given. At most half of it goes to bases of vectors, a quarter to kept graphs
    of ``over_batches(keep="auto")``, and a quarter to a chunk of a vector block. Algorithms without
    a basis take the vectors that their documentation states. The sizes follow from the limit alone,
    so that runs are reproducible, unless the machine has less memory free.
    The option ``memory`` of an algorithm sets the limit of one run.

    Examples:
        >>> diagonal = torch.linspace(0, 1, 1000) ** 8
        >>> with hf.memory_limit(200_000):
        ...     top = hf.lanczos(lambda block: diagonal * block, diagonal, k=1, seed=0)
        >>> round(top.values[0].item(), 3)
        1.0
        >>> top = hf.lanczos(
        ...     lambda block: diagonal * block, diagonal, k=1, seed=0, memory=200_000
        ... )

    Args:
        memory: Bytes on each rank. Inside another limit, the smaller one holds.

    Raises:
        ValueError: If ``memory`` is not positive; raised on entry.
        MemoryError: If a basis or a product with one vector does not fit; raised by the algorithm.
    """
    return limited(memory)


def available_memory(device: torch.device, /) -> int:
    """Return the bytes that this process may still allocate on a device.

    On a CPU, the limit is the free memory of the machine or of the control group, divided by the
    number of local processes that ``torchrun`` started. Inside `memory_limit`, it is at most that.
    """
    free, limit = _free_memory(device), memory_limit_now()
    return free if limit is None else min(free, int(limit))


def _free_memory(device: torch.device) -> int:
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
        read = [x for x in leaves((args, kwargs)) if isinstance(x, Stored)]
        # The copies of weights in another dtype exist while one operation reads them.
        copies = sum(x.nbytes for x in read) if read and Stored.copies(func) else 0
        self.now += copies
        out = func(*args, **kwargs)
        if not func.is_view:
            self.operations += 1
            self.entries += sum(x.numel() for x in leaves(out) if isinstance(x, Tensor))
        for storage in _storages(out):
            # A view of an argument shares its storage, and allocates nothing.
            if storage._cdata not in given:
                self._hold(storage)
        self.peak = max(self.peak, self.now)
        self.now -= copies
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
        if isinstance(tensor, Stored):
            tensor = tensor.held
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
