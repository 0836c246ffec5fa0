"""Keep values that autograd treats as constant fixed in finite differences of a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hessfunc.autograd.overrides import Replaced, Replacements, needs_gradient

# Functions whose results do not depend on the values of their arguments.
_OF_SHAPES = {
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like),
    *(torch.rand_like, torch.randn_like, torch.randint_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor),
}


class Constants(Replaced):
    """Mode that replays the constants of a first evaluation at shifted parameters.

    Autograd treats values as constant if they are detached, computed under ``no_grad``, or
    converted to Python numbers. A finite difference would see them change. The first evaluation
    records each value that is computed from a tensor that needs a gradient but needs none itself.
    Later evaluations get the recorded values in the same order.

    Values inside an `autograd.Function` are not constants, because its backward defines their
    gradient.
    """

    def __init__(self, replaced: Replacements) -> None:
        super().__init__(replaced)
        self._values: list[Any] = []
        self._evaluations = 0
        self._next = 0
        self._by_user = False
        self._suspended = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context manager that neither records nor replays, for instance during the backward."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    def start(self) -> None:
        """Start an evaluation. The first one records constants, all others replay them."""
        self._evaluations += 1
        self._next = 0

    def finish(self) -> None:
        """End an evaluation.

        Raises:
            RuntimeError: If the evaluation used fewer constants than the first one.
        """
        if self._evaluations > 1 and self._next != len(self._values):
            raise RuntimeError(_ANOTHER_PATH)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._suspended:
            return super().__torch_function__(func, types, args, kwargs)
        enabled = torch.is_grad_enabled()
        if func is torch._C._set_grad_enabled:
            if not torch._C._are_functorch_transforms_active():
                self._by_user = not args[0] and (enabled or self._by_user)
            return super().__torch_function__(func, types, args, kwargs)
        token = _active.set(self)
        try:
            result = super().__torch_function__(func, types, args, kwargs)
        finally:
            _active.reset(token)
        if enabled:
            self._by_user = False
        elif not (self._by_user or torch.is_inference_mode_enabled()):
            return result
        if func in _OF_SHAPES or not needs_gradient(args, kwargs):
            return result
        if func is Tensor.__setitem__:
            self._repeated(args[0], in_place=True)
            return result
        in_place = any(result is value for value in (*args, *(kwargs or {}).values()))
        return self._repeated(result, in_place=in_place)

    def constant(self, value: Tensor) -> Tensor:
        """Detach a tensor inside a replacement function, and record or replay its value."""
        return self._repeated(value.detach(), in_place=False) if value.requires_grad else value

    def _repeated(self, result: Any, *, in_place: bool) -> Any:
        if isinstance(result, (tuple, list)):
            return type(result)([self._repeated(part, in_place=False) for part in result])
        if isinstance(result, Tensor):
            if result.requires_grad or not result.is_floating_point():
                return result
        elif not isinstance(result, float):
            return result
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "the loss uses transforms of torch.func, inside of which finite differences cannot "
                "tell what autograd treats as constant: use `hvp(loss, mode='reverse')`"
            )
        if self._evaluations == 1:
            kept = isinstance(result, Tensor)
            self._values.append(result.detach().clone() if kept else result)
            return result
        if self._next >= len(self._values):
            raise RuntimeError(_ANOTHER_PATH)
        value = self._values[self._next]
        self._next += 1
        if not isinstance(value, Tensor):
            return value
        if not isinstance(result, Tensor) or result.shape != value.shape:
            raise RuntimeError(_ANOTHER_PATH)
        if in_place:
            with torch.no_grad():
                return result.copy_(value)
        return value.clone()


_ANOTHER_PATH = (
    "the loss takes another path at shifted parameters, so finite differences cannot keep the "
    "values that it detaches constant: use `hvp(loss, mode='reverse')`"
)

_active: ContextVar[Constants | None] = ContextVar("constants", default=None)


def constant(value: Tensor, /) -> Tensor:
    """Detach a tensor. In finite differences, keep the value of the first evaluation."""
    mode = _active.get()
    return value.detach() if mode is None else mode.constant(value)
