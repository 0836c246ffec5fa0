"""Verification that the observed uses of parameters are all of them, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hessfunc.kronecker.linear_maps import Inputs, OneHot
from hessfunc.kronecker.observation import Observed, is_close
from hessfunc.kronecker.uses import Order, Use, Uses
from hessfunc.numerics import cosines

UNORDERED = (
    "the rows of the outputs are not ordered by the examples along the first axis, or the model "
    "mixes examples"
)


@dataclass
class Verification:
    """Verification of observed uses, once for each structure of a model.

    Two backward passes verify the uses. For a cotangent w at the outputs, the gradient of a
    parameter must be ``G = sum_bp g_bp x_bp'``; its projection ``u'G v`` is compared. For the
    cotangent ``s_b w_b``, with a different s_b for each example, the gradient at the output of a
    call must be ``s_b g_b``.

    Attributes:
        known: Orders of the rows of all calls of each parameter, or the reason for which it has no
            verified uses, for each structure.
        expansions: Whether rows that all examples share may be expanded, as for `observed`.
    """

    known: dict[Any, dict[str, tuple[Order, ...] | str]] = field(default_factory=dict)
    expansions: dict[Any, bool] = field(default_factory=dict)

    def __call__(self, observed: Sequence[Observed], leaves: Mapping[str, Tensor], /) -> Observed:
        """Return the evaluation with the most verified uses, the first of several, and only these.

        Args:
            observed: Evaluations for each possible number of examples.
            leaves: Parameters, which require a gradient.
        """
        return max(
            (self._verified(one, leaves) for one in observed), key=lambda seen: len(seen.uses)
        )

    def _verified(self, observed: Observed, leaves: Mapping[str, Tensor]) -> Observed:
        """Return the evaluation with verified uses only."""
        if not observed.uses:
            return observed
        structure = _structure(observed)
        found = self.known.get(structure)
        if found is None:
            found = _found(observed, leaves)
            # A single example does not show whether others are independent of it.
            if observed.examples > 1:
                self.known[structure] = found
        verified, others = {}, dict(observed.others)
        for name, uses in observed.uses.items():
            orders = found[name]
            if isinstance(orders, str):
                others[name] = orders
            else:
                pairs = zip(uses.calls, orders, strict=True)
                calls = tuple(replace(call, order=order) for call, order in pairs)
                verified[name] = Uses(calls, uses.examples)
        return replace(observed, uses=verified, others=others)


def _structure(observed: Observed) -> Any:
    """Return a value that is equal for evaluations with calls of the same kinds and rows."""
    count = observed.examples
    calls = tuple(
        (
            name,
            tuple((call.map.layout, call.output.dim(), call.rows // count) for call in use.calls),
        )
        for name, use in observed.uses.items()
    )
    return calls, len(observed.outputs) // count, frozenset(observed.others)


def _found(observed: Observed, leaves: Mapping[str, Tensor]) -> dict[str, tuple[Order, ...] | str]:
    """Return the order of the rows of each call, or the reason why a use is not verified."""
    outputs, uses, examples = observed.outputs, observed.uses, observed.examples
    along = cosines(outputs)
    slopes = observed.gradients(uses.values(), along, [leaves[name] for name in uses])
    found: dict[str, tuple[Order, ...] | str] = {}
    for name in uses:
        if uses[name].layout is None:
            found[name] = "its uses are of different kinds"
        elif not _is_projection(uses[name], slopes, slopes[id(leaves[name])]):
            found[name] = "it is also used in ways that were not observed"
    scaled_slopes = slopes
    scales = torch.linspace(1, 2, examples, dtype=outputs.dtype, device=outputs.device)
    if examples > 1:
        scaled = along.reshape(examples, -1) * scales[:, None]
        scaled_slopes = observed.gradients(uses.values(), scaled.view_as(outputs))
    for name, use in uses.items():
        if name not in found:
            orders = [_order(call, slopes, scaled_slopes, scales) for call in use.calls]
            known = tuple(order for order in orders if order is not None)
            found[name] = known if len(known) == len(orders) else f"its rows and {UNORDERED}"
    return found


def _is_projection(uses: Uses, slopes: Mapping[int, Tensor], gradient: Tensor) -> bool:
    """Return whether the projection of the gradient G on u and v is that of the sum over calls.

    ``u'G v = sum_bp (u'g_bp) (x_bp'v)`` needs no product of matrices.
    """
    layout = uses.layout
    assert layout is not None
    groups, outputs, inputs = layout.sizes
    u = cosines(gradient.new_empty(groups, outputs))
    v = cosines(gradient.new_empty(groups, inputs), step=1.618)
    own, x = uses.moments(slopes)
    terms = torch.einsum("bgop,go->bgp", own.to(gradient), u) * _along(x, v)
    weights = layout.permuted(gradient.reshape(1, -1))[0]
    projection = torch.einsum("go,gok,gk->g", u, weights, v)
    return is_close(terms.sum((0, 2)), projection, terms.abs().sum((0, 2)), _eps(uses, gradient))


def _eps(uses: Uses, gradient: Tensor) -> float:
    """Return the largest relative rounding error of a gradient and of the outputs of its uses."""
    return max(torch.finfo(each.dtype).eps for each in (gradient, *uses.outputs))


def _along(inputs: Inputs, v: Tensor) -> Tensor:
    """Return ``x_bp'v`` for all examples and positions, ``(B, G, P)``."""
    if isinstance(inputs, OneHot):
        # The index K has no input.
        return torch.cat([v[0], v.new_zeros(1)])[inputs.indices][:, None]
    return torch.einsum("bgkp,gk->bgp", inputs.to(v), v)


def _order(
    call: Use, slopes: Mapping[int, Tensor], scaled: Mapping[int, Tensor], scales: Tensor
) -> Order | None:
    """Return the order of the rows of a call, or None if they are not those of examples."""
    before, after = (call.map.slopes(each[id(call.output)]) for each in (slopes, scaled))
    orders: tuple[Order, ...] = ("examples first", "examples last")
    for order in orders:
        ordered = replace(call, order=order)
        one, other = (ordered.by_example(rows, len(scales)) for rows in (before, after))
        expected = one * scales.to(one).view(-1, 1, 1, 1)
        if is_close(other, expected, expected, torch.finfo(one.dtype).eps):
            return order
    return None
