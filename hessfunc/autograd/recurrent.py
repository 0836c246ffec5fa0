"""Recurrent layers composed of linear and elementwise functions.

The recurrent functions of torch have no rule for `torch.func.vmap`. Torch evaluates them by the
same formulas on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.functorch import transforming
from hessfunc.autograd.overrides import Replacements

# Hidden state, and for an LSTM also its cell state.
_State: TypeAlias = tuple[Tensor, ...]
# Function (input, state, input gates, hidden gates) of a time step.
_Step: TypeAlias = Callable[[_State, Tensor, Tensor], _State]


def _lstm(state: _State, of_input: Tensor, of_hidden: Tensor) -> _State:
    i, f, g, o = (of_input + of_hidden).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(state: _State, of_input: Tensor, of_hidden: Tensor) -> _State:
    reset, update, new = of_input.chunk(3, -1)
    reset_of_hidden, update_of_hidden, new_of_hidden = of_hidden.chunk(3, -1)
    z = torch.sigmoid(update + update_of_hidden)
    n = torch.tanh(new + torch.sigmoid(reset + reset_of_hidden) * new_of_hidden)
    return ((1 - z) * n + z * state[0],)


def _tanh(state: _State, of_input: Tensor, of_hidden: Tensor) -> _State:
    return (torch.tanh(of_input + of_hidden),)


def _relu(state: _State, of_input: Tensor, of_hidden: Tensor) -> _State:
    return (torch.relu(of_input + of_hidden),)


def _composed(function: Any, step: _Step) -> Callable[..., Any]:
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
        x, given, weights, has_biases, layers, dropout, training, both_ways, batch_first = args
        if dropout and training and layers > 1:
            raise NotImplementedError(
                "dropout between recurrent layers draws other masks under a transform of "
                "torch.func: call `model.eval()` before `functional(model)`"
            )
        start: _State = given if isinstance(given, tuple) else (given,)
        directions = 2 if both_ways else 1
        parts = _of_layers(weights, layers * directions)
        x = x.transpose(0, 1) if batch_first else x
        ends: list[_State] = []
        for layer in range(layers):
            outs = []
            for way in range(directions):
                place = layer * directions + way
                own = tuple(s[place] for s in start)
                out, end = _layer(step, x.flip(0) if way else x, own, next(parts), has_biases)
                outs.append(out.flip(0) if way else out)
                ends.append(end)
            x = torch.cat(outs, -1)
        states = [torch.stack(parts) for parts in zip(*ends, strict=True)]
        return (x.transpose(0, 1) if batch_first else x, *states)

    return replacement


def _of_layers(weights: Sequence[Tensor], count: int) -> Iterator[Sequence[Tensor]]:
    size = len(weights) // count
    return (weights[i : i + size] for i in range(0, len(weights), size))


def _layer(
    step: _Step, x: Tensor, state: _State, weights: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, _State]:
    """Return the outputs ``(time, ...)`` and the last state of one direction of a layer."""
    of_input, of_hidden = weights[:2]
    biases = weights[2:4] if has_biases else (None, None)
    # An LSTM with `proj_size` multiplies its hidden state by one more matrix.
    projection = weights[4:] if has_biases else weights[2:]
    moved = F.linear(x, of_input, biases[0])
    outs = []
    for t in range(len(x)):
        state = step(state, moved[t], F.linear(state[0], of_hidden, biases[1]))
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outs.append(state[0])
    return torch.stack(outs), state


RECURRENT: Replacements = {
    function: _composed(function, step)
    for function, step in (
        (torch.lstm, _lstm),
        (torch.gru, _gru),
        (torch.rnn_tanh, _tanh),
        (torch.rnn_relu, _relu),
    )
}
