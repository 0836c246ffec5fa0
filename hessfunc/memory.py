"""How much memory is left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["available_memory"]


def available_memory(device: torch.device, /) -> int:
    """The bytes that this process may still take: of the GPU, or of the machine or its cgroup."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    free = _of_machine()
    return free if limit is None or used is None else max(0, min(free, limit - used))


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
