"""Calls of modules with other parameters and buffers than their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module


def call_with(
    module: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    /,
) -> Any:
    """Call a module with other parameters and buffers, and restore its own.

    `torch.func.functional_call` restores in the order in which it has replaced. A module with
    several names then keeps the given tensors, and is no longer tied to modules that share its own.

    Args:
        module: Module.
        state: Parameters and buffers by name. A name stands for all tensors that are tied to it.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    with _reparametrize_module(module, dict(state), tie_weights=True, stack_weights=True):
        return module(*args, **(kwargs or {}))
