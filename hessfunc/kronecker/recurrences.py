"""Recurrent layers of torch as calls of linear maps, one for each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

# State of a cell: the hidden state, and the cell state of an LSTM.
State: TypeAlias = tuple[Tensor, ...]
# Function of the products with the input and with the hidden state, and of the state.
Cell: TypeAlias = Callable[[Tensor, Tensor, State], State]


def unrolled(function: Any, args: Sequence[Any], kwargs: Any, /) -> Callable[[], Any] | None:
    """Return the same call as a composition of ``F.linear`` and functions without parameters.

    None is returned for other functions, for packed sequences, and for dropout in train mode.
    """
    if kwargs:
        return None
    if (cell := _CELLS.get(function)) is not None:
        return partial(_one_step, cell, *args)
    cell = _LAYERS.get(function)
    # Packed sequences have the sizes of their batches before the state.
    if cell is None or len(args) != 9 or not isinstance(args[2], list | tuple):
        return None
    dropout, train = args[5:7]
    return None if dropout and train else partial(_layers, cell, *args)


def _layers(
    cell: Cell,
    x: Tensor,
    initial: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    x = x.transpose(0, 1) if batch_first else x
    states = (initial,) if isinstance(initial, Tensor) else tuple(initial)
    size = len(weights) // (layers * (1 + bidirectional))
    last: list[State] = []
    for _ in range(layers):
        ends = []
        for way in range(1 + bidirectional):
            place = len(last)
            own = weights[place * size : (place + 1) * size]
            state = tuple(part[place] for part in states)
            outputs, state = _sequence(cell, x.flip(0) if way else x, state, own, has_biases)
            ends.append(outputs.flip(0) if way else outputs)
            last.append(state)
        x = torch.cat(ends, -1)
    final = (torch.stack(parts) for parts in zip(*last, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *final)


def _sequence(
    cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, State]:
    """Return the hidden states ``(T, B, H)`` of one layer in one direction, and the last state."""
    of_input, of_hidden, *others = weights
    biases = others[:2] if has_biases else (None, None)
    projection = others[2:] if has_biases else others
    outputs = []
    for given in F.linear(x, of_input, biases[0]):
        hidden, *rest = cell(given, F.linear(state[0], of_hidden, biases[1]), state)
        if projection:
            hidden = F.linear(hidden, projection[0])
        state = hidden, *rest
        outputs.append(hidden)
    return torch.stack(outputs), state


def _one_step(
    cell: Cell,
    x: Tensor,
    state: Tensor | Sequence[Tensor],
    of_input: Tensor,
    of_hidden: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> Tensor | State:
    before = (state,) if isinstance(state, Tensor) else tuple(state)
    given = F.linear(x, of_input, input_bias)
    after = cell(given, F.linear(before[0], of_hidden, hidden_bias), before)
    return after[0] if isinstance(state, Tensor) else after


def _lstm(given: Tensor, recurrent: Tensor, state: State) -> State:
    enter, forget, new, leave = (given + recurrent).chunk(4, -1)
    memory = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * memory.tanh(), memory


def _gru(given: Tensor, recurrent: Tensor, state: State) -> State:
    (reset, keep, new), (reset_h, keep_h, new_h) = given.chunk(3, -1), recurrent.chunk(3, -1)
    kept = (keep + keep_h).sigmoid()
    candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return ((1 - kept) * candidate + kept * state[0],)


def _tanh(given: Tensor, recurrent: Tensor, state: State) -> State:
    return ((given + recurrent).tanh(),)


def _relu(given: Tensor, recurrent: Tensor, state: State) -> State:
    return ((given + recurrent).relu(),)


_LAYERS: dict[Any, Cell] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}
_CELLS: dict[Any, Cell] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
}
