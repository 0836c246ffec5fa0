"""Check that custom autograd functions can be differentiated a second time.

A backward that detaches, leaves torch, or is marked with ``once_differentiable`` gives the right
gradient. Autograd then loses, often without an error, how the gradient depends on its inputs.
Python functions (`torch.autograd.Function`, custom operators), C++ functions of extensions and
hooks can have such a backward; torch's own nodes are exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from hessfunc.autograd.derivative_checks import (
    CustomCall,
    cotangent_error,
    differs,
    directions_of,
    input_error,
    is_cut_from,
    is_wrong,
    random_direction,
    value_error,
)
from hessfunc.autograd.functorch import nodes_of

# Classes and flags of custom functions that have passed the check.
Verified: TypeAlias = set[Any]


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
    of call, nine gradients of the custom function alone. Hooks add five gradients and the
    derivative of one.
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
        if is_wrong(call, value_error):
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
    for node in nodes_of(ends):
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
        if is_wrong(call, cotangent_error) or (not linear and is_wrong(call, input_error)):
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
def _recorded(functions: Sequence[type[Function]]) -> Iterator[dict[Any, CustomCall]]:
    """Record one call of each kind that this thread makes to these functions.

    ``Function.apply`` cannot be patched, because users keep references to it. However, ``apply``
    looks up ``forward`` in each call.
    """
    calls: dict[Any, CustomCall] = {}
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


def _call(function: type[Function], args: tuple[Any, ...]) -> CustomCall:
    # Clone the tensors, because a function may change its arguments in place.
    kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
    return CustomCall(function, kept, _moving(args))


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
    cotangents = [random_direction(y, 1, i).requires_grad_() for i, y in enumerate(ends)]
    if is_cut_from(ends, leaves, cotangents, dtype):
        names = " and ".join(hooks or nodes)
        raise NotImplementedError(
            f"the gradient passes through {names}, which detaches the gradient or is not linear "
            "in it, so the second derivative would be incomplete: remove the hook, or write it "
            "with torch operations on the gradient, without `detach` or `.data`"
        )
    if linear:
        return

    def backward(at: Sequence[Tensor], *, create_graph: bool) -> Sequence[Tensor | None]:
        ends = again(at)
        return torch.autograd.grad(
            ends,
            at,
            [random_direction(y, 1, i) for i, y in enumerate(ends)],
            create_graph=create_graph,
            allow_unused=True,
        )

    if differs(backward, leaves, directions_of(leaves, dtype), dtype):
        foreign = [name for name in nodes if not name.startswith("BackwardHook")]
        if foreign:
            raise NotImplementedError(_cut_message(" or ".join(foreign), linear=linear))
        raise NotImplementedError(
            f"{' and '.join(hooks)} changes the gradient, and autograd would apply the hook again "
            "in the second derivative, which is then not that of the gradient: remove the hook, or "
            "scale the tensor itself"
        )
