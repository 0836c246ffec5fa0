"""What autograd graphs and this process hold in memory."""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        # Detached: a node that saves its own output would hold itself.
        self.tensor = tensor.detach()


@dataclass
class Graphs:
    """The tensors that graphs hold now, and the number that they held at most."""

    alive: weakref.WeakSet[_Saved] = field(default_factory=weakref.WeakSet)
    most: int = 0

    def hold(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self.alive.add(saved)
        self.most = max(self.most, len(self.alive))
        return saved


@contextmanager
def counted_graphs() -> Iterator[Graphs]:
    """Count the tensors that graphs made inside hold."""
    graphs = Graphs()
    with saved_tensors_hooks(graphs.hold, lambda saved: saved.tensor):
        yield graphs


def resident_bytes() -> int:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Allocated:
    """The bytes that torch has handed out on the CPU: at most, and to what is still alive."""

    peak: int
    kept: int


def allocated(run: Callable[[], object]) -> Allocated:
    """What a call allocates; its result is alive at the end."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return Allocated(peak, now)
