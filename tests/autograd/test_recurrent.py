"""Recurrent layers under `torch.func.vmap`, against torch's own."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.recurrent import RECURRENT

LAYERS = {
    "lstm": lambda **options: nn.LSTM(3, 4, **options),
    "lstm, projected": lambda **options: nn.LSTM(3, 4, proj_size=2, **options),
    "gru": lambda **options: nn.GRU(3, 4, **options),
    "tanh": lambda **options: nn.RNN(3, 4, **options),
    "relu": lambda **options: nn.RNN(3, 4, nonlinearity="relu", **options),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "batch_first": True, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_of_an_ensemble(name: str, options: dict[str, object]) -> None:
    layers = [LAYERS[name](**options).double() for _ in range(3)]
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    stacked = {
        key: torch.stack([dict(layer.named_parameters())[key].detach() for layer in layers])
        for key, _ in layers[0].named_parameters()
    }

    def outputs(params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with Replaced(RECURRENT):
            out, state = functional_call(layers[0], params, (x,))
        return out, state if isinstance(state, Tensor) else torch.cat([s.flatten() for s in state])

    found, states = vmap(outputs)(stacked)
    for i, layer in enumerate(layers):
        out, state = layer(x)
        whole = state if isinstance(state, Tensor) else torch.cat([s.flatten() for s in state])
        torch.testing.assert_close(found[i], out)
        torch.testing.assert_close(states[i], whole)


def test_packed_sequences_are_refused_under_transforms_alone() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    layer = nn.LSTM(3, 4)

    def total(params: dict[str, Tensor]) -> Tensor:
        with Replaced(RECURRENT):
            return functional_call(layer, params, (packed,))[0].data.sum()

    params = {name: p.detach() for name, p in layer.named_parameters()}
    torch.testing.assert_close(total(params), layer(packed)[0].data.sum().detach())
    with pytest.raises(NotImplementedError, match="padded"):
        grad(total)(params)


def test_dropout_between_layers_is_refused() -> None:
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5).train()
    x = torch.randn(2, 5, 3)

    def outputs(scale: Tensor) -> Tensor:
        with Replaced(RECURRENT):
            return layer(scale * x)[0]

    with pytest.raises(NotImplementedError, match="dropout"):
        vmap(outputs)(torch.ones(2))
