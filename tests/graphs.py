"""How many tensors are held by autograd graphs."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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
