"""Calls that are linear in a parameter, and all of them as one dependence."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessfunc.kronecker.linear_maps import Inputs, Layout, LinearMap, OneHot, as_vectors

# Order of the rows of an output: example after example, or one row of each example after another.
Order: TypeAlias = Literal["examples first", "examples last"]


@dataclass(frozen=True)
class Use:
    """Call of a function of torch that is linear in a parameter.

    Attributes:
        map: Dependence of the output on the parameter.
        output: Output of the call, which a later function may change in place.
        edge: Edge of the graph at which the gradient is that of the output as the call returned it.
        order: Order of the rows of the output.
    """

    map: LinearMap
    output: Tensor
    edge: GradientEdge
    order: Order = "examples first"

    @property
    def rows(self) -> int:
        """Number of rows of the output."""
        return len(self.map.slopes(self.output.detach()))

    def by_example(self, rows: Tensor, examples: int) -> Tensor:
        """Move the R rows of an example to positions: ``(B R, G, N, P)`` to ``(B, G, N, R P)``."""
        if len(rows) == examples:
            return rows
        if self.order == "examples first":
            return rows.unflatten(0, (examples, -1)).movedim(1, 3).flatten(3)
        return rows.unflatten(0, (-1, examples)).movedim(0, 3).flatten(3)


@dataclass(frozen=True)
class Uses:
    """All uses of a parameter in the model. The positions of all calls are concatenated.

    Attributes:
        calls: Calls that use the parameter.
        examples: Number of examples, B.
    """

    calls: tuple[Use, ...]
    examples: int

    @property
    def layout(self) -> Layout | None:
        """Layout of the parameter, or None if its uses are of different kinds.

        Some calls may multiply by the transpose of a matrix. A tied embedding and head are an
        example: a lookup multiplies unit vectors by the transpose.
        """
        first = next((u.map for u in self.calls if u.map.source is not None), self.calls[0].map)
        ways = {call.map.layout for call in self.calls}
        return first.layout if ways <= {first.layout, first.layout.transpose} else None

    @property
    def is_two_way(self) -> bool:
        """Whether calls multiply by a matrix and by its transpose."""
        return len({call.map.layout for call in self.calls}) > 1

    def ways(self) -> tuple[Uses, Uses]:
        """Return the calls with the layout of the parameter, and those of its transpose."""
        first, second = (
            tuple(call for call in self.calls if (call.map.layout == self.layout) is is_first)
            for is_first in (True, False)
        )
        return Uses(first, self.examples), Uses(second, self.examples)

    def moments(self, gradients: Mapping[int, Tensor]) -> tuple[Tensor, Inputs]:
        """Return gradients g and inputs x at all positions, so that the weight has ``sum g x'``.

        The gradient ``sum_p g_p x_p'`` of the transpose is ``sum_p x_p g_p'``: the inputs of its
        calls count as gradients of outputs, and the other way round.
        """
        if not self.is_two_way:
            return self.slopes(gradients), self.inputs()
        first, second = self.ways()
        slopes, others = first.slopes(gradients), second.slopes(gradients)
        inputs, given = (
            as_vectors(one.inputs(), slopes).expand(self.examples, -1, -1, -1)
            for one in (first, second)
        )
        return torch.cat([slopes, given], -1), torch.cat([inputs, others.to(slopes)], -1)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Output of each call."""
        return tuple(call.output for call in self.calls)

    def slopes(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Return the gradients at the outputs, as ``(B, G, O, P)``, from those of all calls."""
        pairs = ((call, gradients[id(call.output)]) for call in self.calls)
        return _joined(
            [call.by_example(call.map.slopes(slope), self.examples) for call, slope in pairs]
        )

    def inputs(self) -> Inputs:
        """Return the inputs X at all positions, ``(B, G, K, P)``; B is 1 if examples share them."""
        every = [(call, call.map.inputs()) for call in self.calls]
        lookups = [inputs for _, inputs in every if isinstance(inputs, OneHot)]
        is_lookup = len(lookups) == len(every)
        parts = []
        for call, inputs in every:
            slopes = call.map.slopes(call.output.detach())
            if is_lookup and isinstance(inputs, OneHot):
                indices = inputs.indices[:, None, None].expand(len(slopes), -1, -1, -1)
                parts.append(call.by_example(indices, self.examples))
                continue
            vectors = as_vectors(inputs, slopes).expand(-1, -1, -1, slopes.shape[-1])
            if len(vectors) < len(slopes):
                parts.append(vectors.repeat(1, 1, 1, len(slopes) // self.examples))
            else:
                parts.append(call.by_example(vectors, self.examples))
        rows = max(map(len, parts))
        whole = _joined([part.expand(rows, -1, -1, -1) for part in parts])
        return OneHot(whole[:, 0, 0], lookups[0].size) if is_lookup else whole

    @property
    def source(self) -> Hashable:
        """Value that is equal for parameters with the same inputs X."""

        def of(call: Use) -> Hashable:
            made = call.map
            of_tensor = (id(made.source), made.layout.sizes[2], call.order)
            return id(made) if made.source is None else of_tensor

        return tuple(map(of, self.calls))


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate the positions, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
