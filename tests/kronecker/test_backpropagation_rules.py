"""With one example nothing is averaged: the blocks are those of the Hessian."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.kronecker import Call, Layer, backpropagation_rules, by_autodiff, elementwise, rule
from tests.kronecker.cases import LAYERS, Net, dense, largest_error, net
from tests.reference.backpropagation import exact_blocks


@cache
def hessians(name: str) -> dict[str, Tensor]:
    case = LAYERS[name]
    return exact_blocks(case.loss, case.params, case.batch)


@pytest.mark.parametrize("averages", [(True, True), (False, False)], ids=["averaged", "each"])
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_of_one_example_are_the_hessians(name: str, averages: tuple[bool, bool]) -> None:
    case = LAYERS[name]
    blocks = hf.kronecker.hbp(
        case.loss,
        case.model,
        average_input_jacobian=averages[0],
        average_parameter_jacobian=averages[1],
    )(case.params, case.batch)
    assert largest_error(dense(blocks), hessians(name)) < 1e-10


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_zero_residual_gives_the_blocks_of_the_gauss_newton_matrix(case: Net) -> None:
    blocks = hf.kronecker.hbp(case.loss, case.model, residual="zero")(case.params, case.batch)
    for name, block in blocks.items():
        chosen, rest = hf.split(case.params, [name])
        matvec = hf.ggnvp(hf.hold(case.loss, rest))(chosen, case.batch)
        units = torch.eye(block.n, dtype=torch.float64).view(-1, *block.shape)
        exact = matvec({name: units})[name]
        torch.testing.assert_close(block.matvec(units), exact, rtol=1e-8, atol=1e-12)


def test_the_slope_of_relu_at_zero_is_zero() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].bias.fill_(-2.0)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    curvature = hf.kronecker.hbp(loss, model)

    def of_bias(x: float) -> float:
        batch = (torch.tensor([[x]]).double(), torch.tensor([[0.0]]).double())
        return curvature(params, batch)["0.bias"].trace()

    assert [of_bias(1.0), of_bias(2.0), of_bias(3.0)] == [0.0, 0.0, 2.0]


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


class Scale(nn.Module):
    """A parameter that acts in no usual way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.log_scale)


def with_rules() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), Swish(), Scale(5), nn.Linear(5, 3))


def test_rules_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backpropagation_rules, "_RULES", dict(backpropagation_rules._RULES))
    case = net(with_rules, 4)
    with pytest.raises(NotImplementedError, match="register"):
        hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    seen = []

    @rule(Swish)
    def swish(call: Call) -> Layer:
        seen.append(call.module)
        return elementwise(call)

    rule(Scale)(by_autodiff)
    blocks = hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    exact = exact_blocks(case.loss, case.params, case.batch)
    assert largest_error(dense(blocks), exact) < 1e-10
    assert seen == [case.model[1]]
    positive = hf.kronecker.hbp(case.loss, case.model, residual="clip")(case.params, case.batch)
    for block in positive.values():
        assert float(torch.linalg.eigvalsh(block.dense()).min()) > -1e-12
    rule(Scale)(elementwise)
    with pytest.raises(NotImplementedError, match="at '2', does not differentiate .* 'log_scale'"):
        hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)


def test_rules_are_for_calls_of_modules_and_functions() -> None:
    with pytest.raises(TypeError, match="call must be a Call, not a tensor"):
        elementwise(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a module type"):
        rule(Swish())
    with pytest.raises(TypeError, match="the rule must be a function"):
        rule(Swish)("elementwise")  # type: ignore[type-var]


def test_embeddings_are_referred_to_kronecker_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backpropagation_rules, "_RULES", dict(backpropagation_rules._RULES))
    rule(nn.EmbeddingBag)(by_autodiff)
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    with pytest.raises(NotImplementedError, match="only indices.* use `kflr` or `kfac`"):
        hf.kronecker.hbp(loss, model)(params, (torch.zeros(2, 3).long(), torch.zeros(2).long()))
