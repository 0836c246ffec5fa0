"""Comparison of the derivatives of a function with finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.streams import Streams

# Relative steps of finite differences by dtype. Float64 steps are so small that the few shifted
# entries do not cross kinks.
_STEPS = {torch.float64: (1e-7, 1e-5), torch.float32: (3e-3, 1e-2)}
_ENTRIES = {torch.float64: 4096, torch.float32: 64}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 3e-2}
# Errors that functions raise if they do not support float64.
_NOT_TAKEN = (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class CustomCall:
    """Call of a custom function.

    Attributes:
        function: Class of the function.
        args: Arguments, with tensors detached.
        moving: Indices of the differentiated arguments.
    """

    function: type[Function]
    args: tuple[Any, ...]
    moving: tuple[int, ...]


def is_wrong(call: CustomCall, error: Callable[[CustomCall, torch.dtype], bool | None]) -> bool:
    """Return whether a check fails, in float64 or, if inconclusive, in the dtype of the call."""
    own = {call.args[i].dtype for i in call.moving}
    if not own:
        return False
    wrong = None
    if call.args[call.moving[0]].device.type != "mps":
        try:
            wrong = error(_converted(call, torch.float64), torch.float64)
        except _NOT_TAKEN:
            wrong = None
    if wrong is None and own != {torch.float64}:
        wrong = error(call, torch.float32)
    return bool(wrong)


def _converted(call: CustomCall, dtype: torch.dtype) -> CustomCall:
    args = tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.args
    )
    return CustomCall(call.function, args, call.moving)


def _outputs(call: CustomCall, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the differentiable outputs of a call at other inputs."""
    args = list(call.args)
    for i, leaf in zip(call.moving, leaves, strict=True):
        args[i] = leaf.clone()
    with torch.enable_grad(), Replaced({}, Streams()):
        outputs = call.function.apply(*args)
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y for y in values if isinstance(y, Tensor) and y.requires_grad]


def _leaves(call: CustomCall) -> list[Tensor]:
    return [call.args[i].detach().clone().requires_grad_() for i in call.moving]


def cotangent_error(call: CustomCall, dtype: torch.dtype) -> bool | None:
    """Return whether the derivative of the backward with respect to its cotangents is wrong.

    A backward B(x, g) is linear in g. For any u, <B(x, g), u> therefore equals its own derivative
    along g, which is sum_i g_i d<B(x, g), u>/dg_i.
    """
    leaves = _leaves(call)
    outputs = _outputs(call, leaves)
    cotangents = [random_direction(y, 1, i).requires_grad_() for i, y in enumerate(outputs)]
    return is_cut_from(outputs, leaves, cotangents, dtype)


def is_cut_from(
    ends: Sequence[Tensor],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    dtype: torch.dtype,
) -> bool:
    # `value` is <B(x, g), u> and `along` is its derivative along g; see `cotangent_error`.
    gradient = torch.autograd.grad(ends, leaves, cotangents, create_graph=True, allow_unused=True)
    value, size = _projected(gradient)
    slopes: Sequence[Tensor | None] = [None]
    if value.requires_grad:
        try:
            slopes = torch.autograd.grad(value, cotangents, allow_unused=True)
        except RuntimeError:
            # The backward is marked with `once_differentiable`, or has no derivative.
            return True
    along = sum(
        float((d * c.detach()).sum())
        for d, c in zip(slopes, cotangents, strict=False)
        if d is not None
    )
    return abs(along - float(value.detach())) > _TOLERANCE[dtype] * size


def _projected(gradient: Sequence[Tensor | None]) -> tuple[Tensor, float]:
    """Return sum_i <g_i, u_i> / |g_i| for random u_i, and its typical size.

    The division puts all parts of the gradient on the same scale.
    """
    parts = []
    for i, g in enumerate(gradient):
        if g is not None and (norm := float(g.detach().norm())) > 0:
            parts.append((g * random_direction(g, 2, i)).sum() / norm)
    if not parts:
        return torch.zeros((), dtype=torch.float64, device="cpu"), 0.0
    return torch.stack(parts).sum(), math.sqrt(len(parts))


def input_error(call: CustomCall, dtype: torch.dtype) -> bool | None:
    """Return whether the derivative of the backward with respect to its inputs is wrong."""
    leaves = _leaves(call)
    directions = directions_of(leaves, dtype)
    shapes = [y.detach() for y in _outputs(call, leaves)]

    def backward(at: Sequence[Tensor], *, create_graph: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            _outputs(call, at),
            at,
            [random_direction(y, 1, i) for i, y in enumerate(shapes)],
            create_graph=create_graph,
            allow_unused=True,
        )

    return differs(backward, leaves, directions, dtype)


def value_error(call: CustomCall, dtype: torch.dtype) -> bool | None:
    """Return whether the backward is not the derivative of the forward."""
    leaves = _leaves(call)

    def value(at: Sequence[Tensor], *, create_graph: bool) -> Sequence[Tensor]:
        return _outputs(call, at)

    return differs(value, leaves, directions_of(leaves, dtype), dtype)


def differs(
    field: Callable[..., Sequence[Tensor | None]],
    leaves: Sequence[Tensor],
    directions: Sequence[Tensor],
    dtype: torch.dtype,
) -> bool | None:
    """Return whether autograd's derivative of a vector field differs from finite differences.

    The result is None, which means inconclusive, if the differences depend on the step, as they do
    at kinks. Every step is evaluated, so that all ranks make the same number of evaluations.
    """
    # With f(x) = <field(x), u>, `along` is autograd's derivative of f along the directions v, and
    # each slope is a central difference (f(x + h v) - f(x - h v)) / 2h.
    at = field(leaves, create_graph=True)
    value, size = _projected(at)
    scales = [None if g is None else float(g.detach().norm()) for g in at]
    along = 0.0
    if value.requires_grad:
        gradient = torch.autograd.grad(value, leaves, allow_unused=True)
        along = sum(
            float((d * v).sum()) for d, v in zip(gradient, directions, strict=True) if d is not None
        )

    def projected(sign: float) -> float:
        moved = [
            (x.detach() + sign * v).requires_grad_()
            for x, v in zip(leaves, directions, strict=True)
        ]
        parts = zip(field(moved, create_graph=False), scales, strict=True)
        return sum(
            float((g.detach() * random_direction(g, 2, i)).sum()) / scale
            for i, (g, scale) in enumerate(parts)
            if g is not None and scale
        )

    steps = _STEPS[dtype]
    slopes = [(projected(step) - projected(-step)) / (2 * step) for step in steps]
    if not all(map(math.isfinite, [*slopes, along])):
        return None
    tolerance = _TOLERANCE[dtype]
    errors = [abs(slope - along) for slope in slopes]
    for slope, error in zip(slopes, errors, strict=True):
        if error <= tolerance * (abs(slope) + abs(along) + 1e-2 * size):
            return False
    change = max(abs(a - slopes[0]) for a in slopes)
    return True if change < min(errors) / 10 else None


def directions_of(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return random multiples of a few entries of each leaf, zero elsewhere.

    Entries that are exactly zero do not move, because many functions have a kink at zero.
    """
    directions = []
    for i, leaf in enumerate(leaves):
        x = leaf.detach().flatten()
        moved = torch.zeros_like(x)
        places = x.nonzero()[:, 0]
        base = x if len(places) else torch.ones_like(x)
        places = places if len(places) else torch.arange(len(x), device=x.device)
        stride = -(-len(places) // _ENTRIES[dtype]) or 1
        places = places[::stride]
        moved[places] = base[places] * random_direction(x[places], 3, i)
        directions.append(moved.view_as(leaf))
    return directions


def random_direction(like: Tensor, kind: int, which: int) -> Tensor:
    """Return standard normal numbers that depend only on (kind, which) and the shape."""
    generator = torch.Generator().manual_seed(1000 * kind + which)
    numbers = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(like)
