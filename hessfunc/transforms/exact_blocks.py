"""Exact diagonal blocks of a curvature matrix, one per parameter tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from torch import Tensor

from hessfunc import options
from hessfunc.changes import unchanged
from hessfunc.losses import Loss, LossFunction, OfTargets
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec


@options.validated(curvature=options.factory)
def exact_blocks(
    curvature: Callable[[Any], Curvature], loss: LossFunction, /
) -> Callable[[Mapping[str, Tensor], Any], Mapping[str, Matvec]]:
    """Return the diagonal blocks of a matrix as a function ``(params, batch) -> {name: matvec}``.

    A block is the curvature of the loss with all other parameters held fixed. Its matvec takes and
    returns tensors ``(k, *shape)``, and `matrix` materialises the block. Each lookup makes the
    block again, so that only one graph is in memory at a time.

    Args:
        curvature: Function from a loss to a curvature function, such as `hvp`, `ggnvp` or
            ``functools.partial(pchvp, residual="abs")``.
        loss: Loss of a flat dict of all parameters.

    Raises:
        RuntimeError: If a parameter has changed in place since the lookup; raised by a matvec.

    Cost: a product with a block costs at most a product with the whole matrix, and less in later
    layers. A lookup evaluates the loss once.
    """
    # Curvature functions remember chunk sizes and verified functions, so make one per name.
    by_name: dict[str, Curvature] = {}

    def blocks(params: Mapping[str, Tensor], batch: Any, /) -> Mapping[str, Matvec]:
        def block(name: str) -> Matvec:
            if name not in by_name:
                by_name[name] = curvature(_of_part(loss))
            rest = {other: leaf.detach() for other, leaf in params.items() if other != name}
            refuse_if_changed = unchanged(tuple(rest), list(rest.values()))
            matvec = by_name[name]({name: params[name]}, (rest, batch))

            def product(vectors: Tensor) -> Tensor:
                refuse_if_changed()
                return matvec({name: vectors})[name]

            return product

        return _OnLookup({name: partial(block, name) for name in params})

    return blocks


def _of_part(loss: LossFunction) -> LossFunction:
    """Return the loss of some parameters, for batches ``(rest, batch)`` with the other ones."""
    if not isinstance(loss, Loss):
        return lambda part, pair: loss({**pair[0], **part}, pair[1])
    outputs, criterion = loss.outputs, loss.criterion
    of_pair: Callable[[Any, Any], Tensor] = OfTargets(criterion, itemgetter(1))
    # Rewrap a known criterion, so that its closed form is still recognised.
    if isinstance(criterion, OfTargets):
        targets = criterion.targets
        of_pair = OfTargets(criterion.criterion, lambda pair: targets(pair[1]))
    return Loss(lambda part, pair: outputs({**pair[0], **part}, pair[1]), of_pair)


@dataclass(frozen=True)
class _OnLookup(Mapping[str, Matvec]):
    """Mapping that makes a value at each lookup, and does not keep it.

    Attributes:
        makers: Function that makes each value, by name.
    """

    makers: Mapping[str, Callable[[], Matvec]]

    def __getitem__(self, name: str) -> Matvec:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    def __contains__(self, name: object) -> bool:
        return name in self.makers
