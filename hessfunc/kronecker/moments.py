"""Second moments of inputs and gradients, summed over examples and positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from hessfunc.kronecker.uses import Use
from hessfunc.memory import AT_ONCE, refuse_unless_fits

Sharing: TypeAlias = Literal["expand", "reduce"]
_Key = TypeVar("_Key")


def by_row(columns: Tensor, examples: int) -> list[Tensor]:
    """Split each column into one per row of an example, zero at the other rows.

    Without this, the square of a sum over rows would have cross terms between them.
    """
    rows = columns.shape[1] // examples
    if rows == 1:
        return list(columns)
    parts = []
    for column in columns:
        for row in range(rows):
            one = torch.zeros_like(column).unflatten(0, (examples, rows))
            one[:, row] = column.unflatten(0, (examples, rows))[:, row]
            parts.append(one.flatten(0, 1))
    return parts


def summed_moments(
    outputs: Tensor,
    columns: Sequence[Tensor],
    uses: Mapping[_Key, Use],
    fn: Callable[[_Key, Tensor], Tensor],
) -> dict[_Key, Tensor]:
    """Sum a function of the gradients at the outputs of each use over the columns."""
    ends = {id(end): end for use in uses.values() for end in use.outputs}
    total: dict[_Key, Tensor] = {}
    for column in columns:
        gradients = torch.autograd.grad(
            outputs, list(ends.values()), column, retain_graph=True, materialize_grads=True
        )
        slopes = dict(zip(ends, gradients, strict=True))
        for key, use in uses.items():
            part = fn(key, use.slopes([slopes[id(end)] for end in use.outputs]))
            total[key] = total[key] + part if key in total else part
    return total


def outer_moments(slopes: Tensor, sharing: Sharing) -> Tensor:
    """Return the factor B of one column, ``(G, O, O)``, from gradients ``(B, G, O, P)``."""
    # "expand": sum_bp g_bp g_bp'. "reduce": sum_b (sum_p g_bp) (sum_p g_bp)'.
    return _gram(slopes if sharing == "expand" else slopes.sum(-1, keepdim=True))


def input_moments(inputs: Tensor, sharing: Sharing) -> Tensor:
    """Return the factor A, ``(G, K, K)``, from inputs ``(B, G, K, P)``."""
    # "expand": mean_bp x_bp x_bp'. "reduce": mean_b xbar_b xbar_b'.
    if sharing == "reduce":
        inputs = inputs.mean(-1, keepdim=True)
    return _gram(inputs).div_(len(inputs) * inputs.shape[-1])


def _gram(vectors: Tensor) -> Tensor:
    """Sum outer products over examples and positions: ``(B, G, N, P)`` -> ``(G, N, N)``."""
    groups, width = vectors.shape[1:3]
    refuse_unless_fits(
        groups * width**2,
        vectors,
        f"a Kronecker factor of {width} x {width} entries",
        "hold that layer fixed with `split` and `hold`, or use exact products",
    )
    columns = vectors.permute(1, 2, 0, 3).flatten(2)
    return columns @ columns.mT


def squared_moments(slopes: Tensor, inputs: Tensor) -> Tensor:
    """Sum the squared entries of the gradients of all examples: ``(G, O, K)``.

    Args:
        slopes: Gradients at the outputs, ``(B, G, O, P)``.
        inputs: Inputs, ``(B, G, K, P)``, or ``(1, G, K, P)`` if all examples share them.
    """
    # The gradient of an example is sum_p g_p x_p'. With one position, (g_o x_k)^2 = g_o^2 x_k^2.
    if slopes.shape[-1] == 1:
        left, right = slopes[..., 0].square(), inputs[..., 0].square()
        return torch.einsum("bgo,bgk->gok", left, right.expand(len(slopes), -1, -1))
    inputs = inputs.expand(len(slopes), -1, -1, -1)
    most = max(1, AT_ONCE // (slopes[0, ..., 0].numel() * inputs.shape[2]))
    parts = zip(slopes.split(most), inputs.split(most), strict=True)
    return torch.stack([(s @ x.mT).square().sum(0) for s, x in parts]).sum(0)
