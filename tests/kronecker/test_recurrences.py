"""Recurrent layers: the unrolled calls are those of torch, and have factors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from hessfunc.kronecker.recurrences import unrolled
from tests.kronecker.cases import gauss_newton_blocks, net

LAYERS = {
    "lstm": partial(nn.LSTM, 3, 4, num_layers=2, bidirectional=True),
    "projected": partial(nn.LSTM, 3, 4, proj_size=2, batch_first=True),
    "gru": partial(nn.GRU, 3, 4, num_layers=2, bias=False, batch_first=True),
    "tanh": partial(nn.RNN, 3, 4, bidirectional=True),
    "relu": partial(nn.RNN, 3, 4, nonlinearity="relu"),
}


class Sequences(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = LAYERS[name]()
        width = 2 if name == "projected" else 4 * (1 + self.layer.bidirectional)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        y = self.layer(x)[0]
        return self.head(y if self.layer.batch_first else y.transpose(0, 1)).sum(1)


class Cells(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[:, 0])
        state = self.cell(x[:, 1], state)
        return self.head(state if isinstance(state, Tensor) else state[0])


@pytest.mark.parametrize("name", LAYERS)
def test_unrolled_calls_are_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    weights = layer._flat_weights
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    if layer.batch_first:
        x = x.transpose(0, 1)
    directions = layer.num_layers * (1 + layer.bidirectional)
    sizes = [getattr(layer, "proj_size", 0) or 4, 4]
    state = [torch.randn(directions, 2, size, dtype=torch.float64) for size in sizes]
    initial = tuple(state) if isinstance(layer, nn.LSTM) else state[0]
    names = {"projected": "lstm", "tanh": "rnn_tanh", "relu": "rnn_relu"}
    function = getattr(torch, names.get(name, name))
    settings = layer.bias, layer.num_layers, 0.0, True, layer.bidirectional, layer.batch_first
    call = unrolled(function, (x, initial, weights, *settings), {})
    assert call is not None
    for one, other in zip(call(), function(x, initial, weights, *settings), strict=True):
        torch.testing.assert_close(one, other)
    with_dropout = (layer.bias, layer.num_layers, 0.5, True, *settings[4:])
    assert unrolled(function, (x, initial, weights, *with_dropout), {}) is None


@pytest.mark.parametrize(
    "make",
    [
        *(partial(Sequences, name) for name in LAYERS),
        *(partial(Cells, kind) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
    ],
)
def test_recurrent_layers_have_factors_with_exact_traces(make: partial[nn.Module]) -> None:
    case = net(make, 3, 3, examples=3)
    made = hf.kronecker.ekfac(case.loss, case.model)(case.params, case.batch)
    assert not made.diagonals
    for name, block in gauss_newton_blocks(case).items():
        assert made[name].trace() == pytest.approx(float(block.trace()), rel=1e-9)


def test_packed_sequences_have_exact_diagonals() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(3, 2, batch_first=True), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([2, 4, 3])[: len(x)]
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
            return self.head(self.layer(packed)[1][0])

    case = net(Packed, 4, 3, examples=3)
    with pytest.raises(NotImplementedError, match=r"'layer.weight_ih_l0'.* argument of gru"):
        hf.kronecker.ekfac(case.loss, case.model)(case.params, case.batch)
    curvature = hf.kronecker.ekfac(case.loss, case.model, unsupported="diagonal")
    made = curvature(case.params, case.batch)
    assert made.diagonals == tuple(name for name in case.params if name.startswith("layer"))
    exact = gauss_newton_blocks(case)
    for name in made.diagonals:
        torch.testing.assert_close(made[name].diagonal().flatten(), exact[name].diagonal())
