"""The exact diagonal blocks of a curvature matrix, one parameter tensor each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from torch import Tensor

from hessfunc import options
from hessfunc.losses import Loss, LossFunction, OfTargets
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec, unchanged


@options.validated(curvature=options.factory)
def exact_blocks(
    curvature: Callable[[Any], Curvature], loss: LossFunction, /
) -> Callable[[Mapping[str, Tensor], Any], Mapping[str, Matvec]]:
    """The blocks of a curvature matrix, a function ``(params, batch) -> {name: matvec}``.

    Each block is that of the loss with all other parameters held fixed, and its matvec takes and
    gives tensors ``[k, *shape]``. A block is made when it is looked up, anew each time, so that
    one graph is in memory at a time.

    Args:
        curvature: loss -> curvature function, such as `hvp`, `ggnvp` or
            ``functools.partial(pchvp, residual="abs")``.
        loss: of all parameters, a flat dict.

    Raises:
        RuntimeError: (from a matvec) a parameter has changed in place since the lookup.

    Cost: one product with a block costs at most one product with the whole matrix, less in later
    layers; a lookup evaluates the loss once.
    """
    # Made once a name, as curvature functions remember what they have timed and verified.
    found: dict[str, Curvature] = {}

    def blocks(params: Mapping[str, Tensor], batch: Any, /) -> Mapping[str, Matvec]:
        def block(name: str) -> Matvec:
            if name not in found:
                found[name] = curvature(_of_part(loss))
            rest = {other: leaf.detach() for other, leaf in params.items() if other != name}
            refuse_if_changed = unchanged(tuple(rest), list(rest.values()))
            matvec = found[name]({name: params[name]}, (rest, batch))

            def product(vectors: Tensor) -> Tensor:
                refuse_if_changed()
                return matvec({name: vectors})[name]

            return product

        return _OnLookup({name: partial(block, name) for name in params})

    return blocks


def _of_part(loss: LossFunction) -> LossFunction:
    """The loss of some parameters on batches ``(rest, batch)``, the others held fixed."""
    if not isinstance(loss, Loss):
        return lambda part, pair: loss({**pair[0], **part}, pair[1])
    outputs, criterion = loss.outputs, loss.criterion
    of_pair: Callable[[Any, Any], Tensor] = OfTargets(criterion, itemgetter(1))
    # A known criterion stays known, with its closed forms.
    if isinstance(criterion, OfTargets):
        targets = criterion.targets
        of_pair = OfTargets(criterion.criterion, lambda pair: targets(pair[1]))
    return Loss(lambda part, pair: outputs({**pair[0], **part}, pair[1]), of_pair)


@dataclass(frozen=True)
class _OnLookup(Mapping[str, Matvec]):
    """A mapping whose values are made when they are looked up, and not kept."""

    makers: Mapping[str, Callable[[], Matvec]]

    def __getitem__(self, name: str) -> Matvec:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    def __contains__(self, name: object) -> bool:
        return name in self.makers
