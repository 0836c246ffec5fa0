"""Access to the tensors that `torch.vmap` wraps, and pullbacks through a kept graph.

A backward formula that sees the whole block can choose the memory layout of the probe axis. It
avoids the copies and broadcasts of vmap, which treats each operation separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge

Result = TypeVar("Result")


def transforming() -> bool:
    """Return whether a transform of torch.func, forward mode or torch.compile is active.

    The wrappers of arguments alone would not tell: a loss may have a wrapped tensor in its closure.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


_depth: ContextVar[tuple[int, int] | None] = ContextVar("depth of transforms", default=None)


@contextmanager
def evaluating() -> Iterator[None]:
    """Context manager of an evaluation of a loss, in the transforms that are active outside."""
    token = _depth.set(_depth_now())
    try:
        yield
    finally:
        _depth.reset(token)


def transforms_itself() -> bool:
    """Return whether a loss that is evaluated has begun a transform of its own."""
    outside = _depth.get()
    return transforming() if outside is None else _depth_now() != outside


def _depth_now() -> tuple[int, int]:
    stack = functorch.get_interpreter_stack()
    return 0 if stack is None else len(stack), forward_ad._current_level


def forward_modes() -> int:
    """Return the number of nested ``torch.func.jvp`` around the caller."""
    stack = functorch.get_interpreter_stack() or []
    return sum(interpreter.key() == functorch.TransformType.Jvp for interpreter in stack)


def plain_evaluation() -> AbstractContextManager[Any]:
    """Context in which functions of tensors that no transform has wrapped give such tensors."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return nullcontext()
    return torch._C._DisableFuncTorch()


def is_wrapped(value: object) -> bool:
    """Return whether a value is a tensor that belongs to a transform."""
    return isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value)


def batched(*tensors: Tensor | None) -> bool:
    """Return whether vmap, or a gradient with `is_grads_batched`, has wrapped one of these."""
    return any(
        t is not None and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))
        for t in tensors
    )


def on_blocks(formula: Callable[..., Result], *tensors: Tensor | None) -> Result:
    """Apply a formula of plain tensors to tensors that vmap may have wrapped.

    The formula gets a wrapped tensor with a leading probe axis. Its result is a block, or a tuple
    of blocks and None.
    """
    level = max((_level(tensor) for tensor in tensors), default=0)
    if level == 0:
        return formula(*tensors)
    blocks: Any = formula(*(_beneath(tensor, level) for tensor in tensors))
    if isinstance(blocks, tuple):
        return tuple(_wrapped(block, level) for block in blocks)  # type: ignore[return-value]
    return _wrapped(blocks, level)  # type: ignore[return-value]


def applied(formula: Callable[..., Result], *tensors: Tensor | None) -> Result:
    """Apply a formula in a backward pass, to blocks unless the pass is recorded.

    In grad mode, vmap follows torch's own functions, which give the derivatives of higher orders.
    """
    return formula(*tensors) if torch.is_grad_enabled() else on_blocks(formula, *tensors)


def probes_of(block: Sequence[Tensor | None], alike: Sequence[Tensor | None], /) -> list[Any]:
    """Return the tensors of each probe of a block, or nothing if none of them has a probe axis.

    Args:
        block: Tensors or None, some of them with a leading probe axis.
        alike: Tensors of the same shapes without a probe axis.
    """
    pairs = list(zip(block, alike, strict=True))
    counts = [len(x) for x, y in pairs if x is not None and y is not None and x.dim() > y.dim()]
    return [
        tuple(x if x is None or y is None or x.dim() == y.dim() else x[i] for x, y in pairs)
        for i in range(max(counts, default=0))
    ]


def _wrapped(block: Tensor | None, level: int) -> Tensor | None:
    return None if block is None else functorch._add_batch_dim(block, 0, level)


def _level(tensor: Tensor | None) -> int:
    if tensor is None or not functorch.is_batchedtensor(tensor):
        return 0
    return int(functorch.maybe_get_level(tensor))


def _beneath(tensor: Tensor | None, level: int) -> Tensor | None:
    if tensor is None or _level(tensor) != level:
        return tensor
    return functorch.get_unwrapped(tensor).movedim(functorch.maybe_get_bdim(tensor), 0)


_linear_in_cotangents: ContextVar[bool] = ContextVar("linear in cotangents", default=False)


@contextmanager
def linear_in_cotangents() -> Iterator[None]:
    """Context manager for gradients that are differentiated only by their cotangents.

    A Gauss-Newton matrix needs only such derivatives. The graph does not record how the gradient
    depends on the parameters, and is therefore smaller.
    """
    token = _linear_in_cotangents.set(True)
    try:
        yield
    finally:
        _linear_in_cotangents.reset(token)


def once_more(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the arguments of a gradient, detached inside `linear_in_cotangents`."""
    if not _linear_in_cotangents.get():
        return tensors
    return tuple(None if t is None else t.detach() for t in tensors)


def nodes_of(ends: Sequence[Tensor], /) -> list[Any]:
    """Return the nodes of a graph of autograd, in the order of a depth-first search."""
    # Reading the graph must not trigger the modes of the loss.
    with torch._C.DisableTorchFunction():
        waiting: list[Any] = [end.grad_fn for end in ends]
        seen: dict[Any, None] = {}
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen[node] = None
            waiting.extend(following for following, _ in node.next_functions)
    return list(seen)


def edges(tensors: Sequence[Tensor], /) -> list[GradientEdge]:
    """Return the graph edges of tensors, which do not keep the tensors alive."""
    # Reading the graph must not trigger the modes of the loss.
    with torch._C.DisableTorchFunction():
        return [get_gradient_edge(tensor) for tensor in tensors]


_final: ContextVar[bool] = ContextVar("final gradient", default=False)


@contextmanager
def final_gradient() -> Iterator[None]:
    """Context manager of the last recorded gradient, whose graph is then only multiplied.

    Layers compute what their products need at once, and free the tensors it is computed from.
    """
    token = _final.set(True)
    try:
        yield
    finally:
        _final.reset(token)


def is_final_gradient() -> bool:
    """Return whether the gradient that is computed is the last recorded one."""
    return _final.get()


_last: ContextVar[bool] = ContextVar("last product", default=False)


@contextmanager
def last_product() -> Iterator[None]:
    """Context manager of the last product of a kept graph, which frees the graph on its way."""
    token = _last.set(True)
    try:
        yield
    finally:
        _last.reset(token)


def is_last_product() -> bool:
    """Return whether the graph is freed after the present product."""
    return _last.get()


class Saved:
    """Tensors that a node of the graph saves, and may free before the graph ends.

    ``ctx.save_for_backward`` saves them for as long as the graph lives.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [(tensor, tensor._version) for tensor in tensors]
        self._freed = False

    def tensors(self) -> list[Tensor]:
        """Return the tensors.

        Raises:
            RuntimeError: If a tensor has been modified in place, or freed.
        """
        if self._freed:
            raise RuntimeError("a graph is differentiated after its final gradient")
        for tensor, version in self._tensors:
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {list(tensor.shape)}"
                )
        return [tensor for tensor, _ in self._tensors]

    def free(self) -> None:
        """Free the tensors."""
        self._freed = True
        self._tensors.clear()


def pullback(
    outputs: Sequence[Tensor | GradientEdge], inputs: Sequence[Tensor], /
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Return the function that maps cotangents of outputs to cotangents of inputs.

    The graph is kept for further calls, except by `last_product`. Unlike `torch.autograd.grad`, the
    function does not check shapes, which would take as long as a small product. Cotangents must
    have the shapes and dtypes of the outputs.
    """
    ends, starts = tuple(outputs), tuple(inputs)

    def pulled(cotangents: Sequence[Tensor]) -> list[Tensor]:
        if not ends:
            return [torch.zeros_like(leaf) for leaf in starts]
        keep = not _last.get()
        gradient = _engine_run_backward(ends, tuple(cotangents), keep, False, starts, True, False)
        return [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(starts, gradient, strict=True)
        ]

    return pulled
