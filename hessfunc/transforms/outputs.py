"""Outputs of a model as their floating-point tensors and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessfunc.containers import opened


@dataclass(frozen=True)
class Rest:
    """Outputs of a model without their floating-point tensors.

    Attributes:
        places: Indices of the floating-point tensors among all leaves.
        values: All leaves.
        rebuilt: Function from all leaves to the outputs.
    """

    places: list[int]
    values: list[Any]
    rebuilt: Callable[[Sequence[Any]], Any]

    def outputs(self, floating: Sequence[Tensor]) -> Any:
        """Return the outputs with other floating-point tensors."""
        values = list(self.values)
        for i, leaf in zip(self.places, floating, strict=True):
            values[i] = leaf
        return self.rebuilt(values)


def floating_part(outputs: Any, /) -> tuple[list[Tensor], Rest]:
    """Return the floating-point tensors of outputs, and the rest of them."""
    if isinstance(outputs, Tensor):
        return [outputs], Rest([0], [outputs], lambda values: values[0])
    values, rebuilt = opened(outputs, "outputs")
    places = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.is_floating_point()]
    return [values[i] for i in places], Rest(places, list(values), rebuilt)
