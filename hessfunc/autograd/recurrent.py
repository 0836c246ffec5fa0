"""Recurrent layers composed of linear and elementwise functions.

The recurrent functions of torch have no rule for `torch.func.vmap`. Torch evaluates them by the
same formulas on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.functorch import transforming
from hessfunc.autograd.overrides import Replacements

# Hidden state, and for an LSTM also its cell state.
State: TypeAlias = tuple[Tensor, ...]
# Function (state, product with the input, product with the hidden state) of a time step.
Step: TypeAlias = Callable[[State, Tensor, Tensor], State]


def _lstm(state: State, of_input: Tensor, of_hidden: Tensor) -> State:
    # With gates i, f, g, o: c' = s(f) c + s(i) tanh(g) and h' = s(o) tanh(c').
    i, f, g, o = (of_input + of_hidden).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(state: State, of_input: Tensor, of_hidden: Tensor) -> State:
    # With gates r, z and the candidate n = tanh(n_x + s(r) n_h): h' = (1 - s(z)) n + s(z) h.
    reset, update, new = of_input.chunk(3, -1)
    reset_of_hidden, update_of_hidden, new_of_hidden = of_hidden.chunk(3, -1)
    z = torch.sigmoid(update + update_of_hidden)
    n = torch.tanh(new + torch.sigmoid(reset + reset_of_hidden) * new_of_hidden)
    return ((1 - z) * n + z * state[0],)


def _tanh(state: State, of_input: Tensor, of_hidden: Tensor) -> State:
    return (torch.tanh(of_input + of_hidden),)


def _relu(state: State, of_input: Tensor, of_hidden: Tensor) -> State:
    return (torch.relu(of_input + of_hidden),)


def layers_of(
    step: Step,
    x: Tensor,
    given: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Evaluate a recurrent function of torch step by step, without dropout.

    Args:
        step: Function of a time step. The other arguments are those of the function of torch.
    """
    start = (given,) if isinstance(given, Tensor) else tuple(given)
    directions = 1 + bidirectional
    size = len(weights) // (layers * directions)
    x = x.transpose(0, 1) if batch_first else x
    ends: list[State] = []
    for _ in range(layers):
        outs = []
        for way in range(directions):
            place = len(ends)
            own = weights[place * size : (place + 1) * size]
            state = tuple(part[place] for part in start)
            out, end = _layer(step, x.flip(0) if way else x, state, own, has_biases)
            outs.append(out.flip(0) if way else out)
            ends.append(end)
        x = torch.cat(outs, -1)
    states = [torch.stack(parts) for parts in zip(*ends, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *states)


def _layer(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, State]:
    """Return the outputs ``(time, ...)`` and the last state of one direction of a layer."""
    of_input, of_hidden, *others = weights
    biases = others[:2] if has_biases else (None, None)
    # An LSTM with `proj_size` multiplies its hidden state by one more matrix.
    projection = others[2:] if has_biases else others
    outs = []
    for moved in F.linear(x, of_input, biases[0]):
        state = step(state, moved, F.linear(state[0], of_hidden, biases[1]))
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outs.append(state[0])
    return torch.stack(outs), state


def _composed(function: Any, step: Step) -> Callable[..., Any]:
    """Return a recurrent function that is composed of time steps under a transform."""

    def replacement(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not transforming():
            return function(*args)
        # A PackedSequence comes with its batch sizes and without the flag `batch_first`.
        if not isinstance(args[3], bool):
            raise NotImplementedError(
                "a PackedSequence hides its values from the transforms of torch.func: use padded "
                "sequences under them"
            )
        layers, dropout, training = args[4:7]
        if dropout and training and layers > 1:
            raise NotImplementedError(
                "dropout between recurrent layers draws other masks under a transform of "
                "torch.func: call `model.eval()` before `functional(model)`"
            )
        return layers_of(step, *args)

    return replacement


# Time step of each recurrent function, for a sequence and for a single step.
STEPS: Mapping[Any, Step] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}
CELLS: Mapping[Any, Step] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
}
RECURRENT: Replacements = {function: _composed(function, step) for function, step in STEPS.items()}
