"""Calls of modules with other parameters and buffers."""

import torch
from torch import nn

import hessfunc as hf
from hessfunc.autograd.stateless import call_with
from tests.reference import gradient, relative_error


class Twice(nn.Module):
    """Embedding with two names, whose weight a head shares, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(5, 3)
        self.encoder = nn.ModuleDict({"tokens": self.shared, "layer": nn.Linear(3, 3)})
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.shared.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (
            self.head(torch.tanh(self.encoder["layer"](self.encoder["tokens"](ids)))) * self.scale
        )


IDS = torch.tensor([0, 3, 4])


def test_a_module_with_several_names_keeps_its_own_tensors() -> None:
    model = Twice()
    own = {name: dict(module._parameters) for name, module in model.named_modules()}
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    found = call_with(model, doubled | {"scale": torch.tensor(3.0)}, (IDS,))
    for name, module in model.named_modules():
        assert all(module._parameters[key] is p for key, p in own[name].items())
    assert float(model.scale) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        assert torch.equal(found, 3 * model(IDS))


def test_state_is_not_changed() -> None:
    model = Twice()
    state = {"shared.weight": torch.zeros(5, 3)}
    given = state["shared.weight"]
    call_with(model, state, (IDS,))
    assert state == {"shared.weight": given}


def test_weights_stay_tied_in_every_call() -> None:
    model = Twice().double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    model_fn(params, IDS)
    moved = {name: p + 0.1 for name, p in params.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(moved[name])
    value = nn.functional.cross_entropy(model(IDS), IDS)
    due = torch.autograd.grad(value, list(model.parameters()))
    assert torch.isclose(loss(moved, (IDS, IDS)), value, rtol=1e-12)
    found = gradient(loss, moved, (IDS, IDS))
    assert relative_error(found, torch.cat([g.flatten() for g in due])) < 1e-12
