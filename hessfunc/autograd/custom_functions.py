"""Check that custom autograd functions can be differentiated a second time.

A backward that detaches, leaves torch, or is marked with ``once_differentiable`` gives the right
gradient. Autograd then loses, often without an error, how the gradient depends on its inputs.
Python functions (`torch.autograd.Function`, custom operators), C++ functions of extensions and
hooks can have such a backward; torch's own nodes are exact.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from hessfunc.randomness import seeded

# Classes and flags of custom functions that have passed the check.
Verified: TypeAlias = set[Any]
# Relative steps of finite differences by dtype. Float64 steps are so small that the few shifted
# entries do not cross kinks.
_STEPS = {torch.float64: (1e-7, 1e-5), torch.float32: (3e-3, 1e-2)}
_ENTRIES = {torch.float64: 4096, torch.float32: 64}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 3e-2}
# Errors that functions raise if they do not support float64.
_NOT_TAKEN = (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class _Call:
    """Call of a custom function.

    Attributes:
        function: Class of the function.
        args: Arguments, with tensors detached.
        moving: Indices of the differentiated arguments.
    """

    function: type[Function]
    args: tuple[Any, ...]
    moving: tuple[int, ...]


def _key(function: type[Function], args: tuple[Any, ...]) -> Any:
    """Return the class and flags of a call. Calls with the same key run the same code."""
    flags = [a if isinstance(a, (bool, int, str)) else None for a in args]
    return function, _moving(args), tuple(flags)


def _moving(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the indices of the arguments that are differentiated."""
    return tuple(
        i
        for i, a in enumerate(args)
        if isinstance(a, Tensor) and a.requires_grad and a.is_floating_point()
    )


def refuse_if_cut(
    ends: Sequence[Tensor],
    inputs: Sequence[Tensor],
    again: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    *,
    hooks: Sequence[str] = (),
    verified: Verified,
    linear: bool = False,
) -> None:
    """Raise if a custom function or a hook cuts the second derivatives off a graph.

    Args:
        ends: Tensors at the end of the graph.
        inputs: Leaves at the start of the graph.
        again: Function that evaluates the ends at other leaves. It is called only if the graph has
            custom functions that are not verified yet.
        hooks: Names of the hooks that were registered on tensors of the graph.
        verified: Keys of the functions that have passed this check; updated in place.
        linear: Whether the gradient will be differentiated only with respect to its cotangents,
            as in a Gauss-Newton matrix.

    Raises:
        NotImplementedError: If a second derivative is lost. The message names the operation.

    Cost: a walk over the graph. Custom functions add one evaluation of the ends and, for each kind
    of call, nine gradients of the custom function alone. Hooks add one gradient and its derivative.
    Each check runs once per ``verified`` set.
    """
    python, other, segments = _custom_nodes(ends)
    if segments and ("recomputed", linear) not in verified:
        for segment in segments:
            _refuse_cut_segment(segment, verified=verified, linear=linear)
        verified.add(("recomputed", linear))
    hooked = [*hooks, *(name for name in other if name.startswith("BackwardHook"))]
    missing = [cls for cls, needs in python if (cls, needs, linear) not in verified]
    if missing:
        _refuse_cut_functions(missing, inputs, again, linear=linear)
        verified.update((cls, needs, linear) for cls, needs in python)
    if other or hooks:
        key = (tuple(sorted({*other, *hooks})), linear)
        if key not in verified:
            _refuse_cut_graph(inputs, again, other, hooked, linear=linear)
            verified.add(key)


def refuse_unless_derivatives(
    ends: Sequence[Tensor],
    inputs: Sequence[Tensor],
    again: Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> None:
    """Raise if the backward of a custom function is not the derivative of its forward.

    Finite differences of a gradient depend on the forward, reverse mode only on the backward. For
    a straight-through estimator, the two give different matrices.

    Raises:
        NotImplementedError: If the graph has such a function. The message names the function.
    """
    python, _, _ = _custom_nodes(ends)
    if not python:
        return
    with _recorded([cls for cls, _ in python]) as calls:
        again(inputs)
    for call in calls.values():
        if _is_wrong(call, _value_error):
            raise NotImplementedError(
                f"the backward of {_named(call.function)} is not the derivative of its forward, "
                "like a straight-through estimator, so finite differences give another matrix "
                "than autograd: use `hvp(loss, mode='reverse')`"
            )


def _custom_nodes(
    ends: Sequence[Tensor],
) -> tuple[list[tuple[type[Function], tuple[bool, ...]]], list[str], list[Any]]:
    """Find the nodes of a graph that are not torch's own.

    Returns:
        Python functions with their ``needs_input_grad``, names of other nodes, and nodes of
        `recomputed` functions, whose own graphs are not part of this graph.
    """
    python: dict[tuple[type[Function], tuple[bool, ...]], None] = {}
    other: dict[str, None] = {}
    segments: list[Any] = []
    # Reading the graph must not trigger the modes of the loss.
    with torch._C.DisableTorchFunction():
        waiting: list[Any] = [end.grad_fn for end in ends]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend([following for following, _ in node.next_functions])
        kind = type(node)
        if issubclass(kind, BackwardCFunction):
            custom: Any = node
            function = custom._forward_cls
            if function.__name__ == "BackwardHookFunction":
                other[function.__name__] = None
            elif function.__name__ == "_Recomputed":
                segments.append(node)
            elif not _is_trusted(function):
                python[function, tuple(custom.needs_input_grad)] = None
        elif kind.__name__ == "CppFunction" and _is_foreign(node.name()):
            other[node.name()] = None
    return list(python), list(other), segments


def _refuse_cut_segment(node: Any, *, verified: Verified, linear: bool) -> None:
    """Check the graph of a `recomputed` function by evaluating the function separately."""
    tensors = [tensor.detach() for tensor in node.saved_tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors[: node.count]]
    others = tensors[node.count :]

    def again(at: Sequence[Tensor]) -> list[Tensor]:
        return [y for y in node.pure(*at, *others) if y.requires_grad]

    refuse_if_cut(again(leaves), leaves, again, verified=verified, linear=linear)


def _is_trusted(function: type[Function]) -> bool:
    """Return whether the function belongs to this package or to torch."""
    package = function.__module__.partition(".")[0]
    # torch generates the functions of custom operators in this module, from formulas of the user.
    return package == "hessfunc" or (
        package == "torch" and function.__module__ != "torch._library.autograd"
    )


def _is_foreign(name: str) -> bool:
    """Return whether a C++ node may have a user's formula, such as ``CppNode<Function>``."""
    known = name.startswith("torch::autograd::") and "CppNode" not in name
    return not known or name.endswith("NotImplemented")


def _named(function: type[Function]) -> str:
    name = function.__qualname__.replace("<locals>.", "")
    if name.startswith("GeneratedBackwardFor_"):
        operator = name.removeprefix("GeneratedBackwardFor_").removesuffix("_default")
        return f"the custom operator {operator}"
    return name


def _refuse_cut_functions(
    functions: Sequence[type[Function]],
    inputs: Sequence[Tensor],
    again: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    *,
    linear: bool,
) -> None:
    with _recorded(functions) as calls:
        again(inputs)
    for call in calls.values():
        if _is_wrong(call, _cotangent_error) or (not linear and _is_wrong(call, _input_error)):
            raise NotImplementedError(_cut_message(_named(call.function), linear=linear))


def _cut_message(name: str, *, linear: bool) -> str:
    fix = "" if linear else ", or use `hvp(loss, mode='difference')`"
    return (
        f"{name} has a gradient, but autograd cannot differentiate its backward, and would omit "
        "that part of the second derivative. Write the backward with torch operations on "
        "`ctx.saved_tensors`, save only inputs and outputs there, and avoid `once_differentiable`, "
        f"`detach` and NumPy{fix}"
    )


_patching = threading.RLock()


@contextmanager
def _recorded(functions: Sequence[type[Function]]) -> Iterator[dict[Any, _Call]]:
    """Record one call of each kind that this thread makes to these functions.

    ``Function.apply`` cannot be patched, because users keep references to it. However, ``apply``
    looks up ``forward`` in each call.
    """
    calls: dict[Any, _Call] = {}
    thread = threading.get_ident()

    def watched(function: type[Function], forward: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = function.setup_context is Function.setup_context

        def recording(*args: Any, **kwargs: Any) -> Any:
            given = args[1:] if takes_context else args
            if threading.get_ident() == thread and (key := _key(function, given)) not in calls:
                calls[key] = _call(function, given)
            return forward(*args, **kwargs)

        return recording

    with _patching:
        own = {cls: vars(cls).get("forward") for cls in functions}
        for cls in own:
            cls.forward = staticmethod(watched(cls, cls.forward))  # type: ignore[method-assign]
        try:
            yield calls
        finally:
            for cls, forward in own.items():
                if forward is None:
                    del cls.forward
                else:
                    cls.forward = forward  # type: ignore[method-assign]


def _call(function: type[Function], args: tuple[Any, ...]) -> _Call:
    # Clone the tensors, because a function may change its arguments in place.
    kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
    return _Call(function, kept, _moving(args))


def _is_wrong(call: _Call, error: Callable[[_Call, torch.dtype], bool | None]) -> bool:
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


def _converted(call: _Call, dtype: torch.dtype) -> _Call:
    args = tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.args
    )
    return _Call(call.function, args, call.moving)


def _outputs(call: _Call, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the differentiable outputs of a call at other inputs."""
    args = list(call.args)
    for i, leaf in zip(call.moving, leaves, strict=True):
        args[i] = leaf.clone()
    with torch.enable_grad(), seeded(0, leaves[0].device):
        outputs = call.function.apply(*args)
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y for y in values if isinstance(y, Tensor) and y.requires_grad]


def _leaves(call: _Call) -> list[Tensor]:
    return [call.args[i].detach().clone().requires_grad_() for i in call.moving]


def _cotangent_error(call: _Call, dtype: torch.dtype) -> bool | None:
    """Return whether the derivative of the backward with respect to its cotangents is wrong.

    A backward B(x, g) is linear in g. For any u, <B(x, g), u> therefore equals its own derivative
    along g, which is sum_i g_i d<B(x, g), u>/dg_i.
    """
    leaves = _leaves(call)
    outputs = _outputs(call, leaves)
    cotangents = [_random(y, 1, i).requires_grad_() for i, y in enumerate(outputs)]
    return _is_cut_from(outputs, leaves, cotangents, dtype)


def _is_cut_from(
    ends: Sequence[Tensor],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    dtype: torch.dtype,
) -> bool:
    # `value` is <B(x, g), u> and `along` is its derivative along g; see `_cotangent_error`.
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
            parts.append((g * _random(g, 2, i)).sum() / norm)
    if not parts:
        return torch.zeros(()), 0.0
    return torch.stack(parts).sum(), math.sqrt(len(parts))


def _input_error(call: _Call, dtype: torch.dtype) -> bool | None:
    """Return whether the derivative of the backward with respect to its inputs is wrong."""
    leaves = _leaves(call)
    directions = _directions(leaves, dtype)
    shapes = [y.detach() for y in _outputs(call, leaves)]

    def backward(at: Sequence[Tensor], *, create_graph: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            _outputs(call, at),
            at,
            [_random(y, 1, i) for i, y in enumerate(shapes)],
            create_graph=create_graph,
            allow_unused=True,
        )

    return _differs(backward, leaves, directions, dtype)


def _value_error(call: _Call, dtype: torch.dtype) -> bool | None:
    """Return whether the backward is not the derivative of the forward."""
    leaves = _leaves(call)

    def value(at: Sequence[Tensor], *, create_graph: bool) -> Sequence[Tensor]:
        return _outputs(call, at)

    return _differs(value, leaves, _directions(leaves, dtype), dtype)


def _differs(
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
            float((g.detach() * _random(g, 2, i)).sum()) / scale
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


def _directions(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
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
        moved[places] = base[places] * _random(x[places], 3, i)
        directions.append(moved.view_as(leaf))
    return directions


def _random(like: Tensor, kind: int, which: int) -> Tensor:
    """Return standard normal numbers that depend only on (kind, which) and the shape."""
    generator = torch.Generator().manual_seed(1000 * kind + which)
    numbers = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(like)


def _refuse_cut_graph(
    inputs: Sequence[Tensor],
    again: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    nodes: Sequence[str],
    hooks: Sequence[str],
    *,
    linear: bool,
) -> None:
    """Check the whole graph, for hooks and for functions whose calls cannot be repeated alone."""
    if any(name.endswith("NotImplemented") for name in nodes):
        raise NotImplementedError(
            "the loss passes through a custom operator of torch.library without a derivative, so "
            "its gradient omits that part: call `torch.library.register_autograd`"
        )
    dtype = torch.float64 if {x.dtype for x in inputs} == {torch.float64} else torch.float32
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    ends = again(leaves)
    cotangents = [_random(y, 1, i).requires_grad_() for i, y in enumerate(ends)]
    if _is_cut_from(ends, leaves, cotangents, dtype):
        names = " and ".join(hooks or nodes)
        raise NotImplementedError(
            f"the gradient passes through {names}, which detaches the gradient or is not linear "
            "in it, so the second derivative would be incomplete: remove the hook, or write it "
            "with torch operations on the gradient, without `detach` or `.data`"
        )
    if linear or not [name for name in nodes if not name.startswith("BackwardHook")]:
        return

    def backward(at: Sequence[Tensor], *, create_graph: bool) -> Sequence[Tensor | None]:
        ends = again(at)
        return torch.autograd.grad(
            ends,
            at,
            [_random(y, 1, i) for i, y in enumerate(ends)],
            create_graph=create_graph,
            allow_unused=True,
        )

    if _differs(backward, leaves, _directions(leaves, dtype), dtype):
        raise NotImplementedError(_cut_message(" or ".join(nodes), linear=linear))
