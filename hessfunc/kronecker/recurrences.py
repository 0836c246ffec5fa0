"""Recurrent layers of torch as calls of linear maps, one for each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.recurrent import CELLS, STEPS, State, Step, layers_of


def unrolled(function: Any, args: Sequence[Any], kwargs: Any, /) -> Callable[[], Any] | None:
    """Return the same call as a composition of ``F.linear`` and functions without parameters.

    None is returned for other functions, for packed sequences, and for dropout in train mode.
    """
    if kwargs:
        return None
    if (step := CELLS.get(function)) is not None:
        return partial(_one_step, step, *args)
    step = STEPS.get(function)
    # Packed sequences have the sizes of their batches before the state.
    if step is None or len(args) != 9 or not isinstance(args[2], list | tuple):
        return None
    dropout, train = args[5:7]
    return None if dropout and train else partial(layers_of, step, *args)


def _one_step(
    step: Step,
    x: Tensor,
    state: Tensor | Sequence[Tensor],
    of_input: Tensor,
    of_hidden: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> Tensor | State:
    before = (state,) if isinstance(state, Tensor) else tuple(state)
    moved = F.linear(x, of_input, input_bias)
    after = step(before, moved, F.linear(before[0], of_hidden, hidden_bias))
    return after[0] if isinstance(state, Tensor) else after
