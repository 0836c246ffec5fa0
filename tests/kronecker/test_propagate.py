"""Literal cases, splitting, the user's own rules, and what is refused."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.kronecker import Call, Layer, by_autodiff, elementwise, rule, rules
from hessfunc.kronecker.propagate import Reached, backpropagated
from tests.cases import Residual, TiedHead
from tests.kronecker.cases import dense, exact_blocks, largest_error, net


def test_linear_layer_under_the_squared_norm() -> None:
    """H_x = W' 2I W and H_b = 2I, of Dangel, Harmeling and Hennig's own example."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, lambda z, _: z.square().sum())
    blocks = hf.kronecker.hbp(loss, model)(
        params, (torch.ones(1, 3, dtype=torch.float64), torch.zeros(1))
    )
    expected = torch.tensor([[34.0, 44, 54], [44, 58, 72], [54, 72, 90]], dtype=torch.float64)
    torch.testing.assert_close(blocks["0.bias"].dense(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(blocks["1.bias"].dense(), 2 * torch.eye(2, dtype=torch.float64))
    # H_W = H_z (x) xx' with x the input of the second layer.
    x = model[0](torch.ones(1, 3, dtype=torch.float64)).detach()
    torch.testing.assert_close(
        blocks["1.weight"].dense(), torch.kron(2 * torch.eye(2).double(), x.mT @ x)
    )


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


def eight_rows(examples: int = 1) -> object:
    return net(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)), 4, examples=examples
    )


@pytest.mark.parametrize(("at_most", "expected"), [(3, 3), (5, 4), (10, 8), (1, 1)])
def test_split_rows_are_the_diagonal_parts(at_most: int, expected: int) -> None:
    case = eight_rows()
    blocks = hf.kronecker.hbp(case.loss, case.model, max_blocks=at_most)(case.params, case.batch)
    exact = exact_blocks(case.loss, case.params, case.batch)
    for name in ("0.weight", "0.bias"):
        parts = blocks[name].parts
        assert len(parts) == expected
        start = 0
        for part in parts:
            rows = slice(start, start + part.n)
            torch.testing.assert_close(part.dense(), exact[name][rows, rows])
            start += part.n
        assert start == blocks[name].n
        torch.testing.assert_close(
            dense(blocks)[name], torch.block_diag(*(part.dense() for part in parts))
        )


def test_one_block_is_the_whole_layer() -> None:
    case = eight_rows(examples=5)
    whole = hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    one = hf.kronecker.hbp(case.loss, case.model, max_blocks=1)(case.params, case.batch)
    assert largest_error(dense(one), dense(whole)) < 1e-12


def test_blocks_are_a_matvec_of_the_whole() -> None:
    case = eight_rows(examples=5)
    blocks = hf.kronecker.hbp(case.loss, case.model, residual="abs")(case.params, case.batch)
    assert list(blocks) == list(case.params)
    whole = torch.block_diag(*dense(blocks).values())
    top = hf.lanczos(blocks, case.params, k=3, seed=0)
    torch.testing.assert_close(
        top.values, torch.linalg.eigvalsh(whole)[-3:].flip(0), rtol=1e-6, atol=0
    )
    assert hf.xtrace(blocks, case.params, seed=0).value == pytest.approx(float(whole.trace()))
    assert blocks.trace() == pytest.approx(float(whole.trace()))
    b = torch.func.grad(case.loss)(case.params, case.batch)
    solved = hf.cg(blocks, b, damping=0.1, rtol=1e-10).x
    direct = blocks.inverse_matvec({name: leaf[None] for name, leaf in b.items()}, 0.1)
    for name, leaf in solved.items():
        torch.testing.assert_close(leaf, direct[name][0], rtol=1e-6, atol=1e-10)


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
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
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


def test_the_hessian_at_an_inner_tensor_reaches_the_callback() -> None:
    case = eight_rows()
    seen: list[Reached] = []
    curvature = backpropagated(
        case.loss,
        case.model,
        lambda reached: (
            seen.append(reached)
            or reached.dependence.block(
                reached.hessian, reached.slope, "none", average=True, max_blocks=None
            )
        ),
        residual="none",
        average_input_jacobian=True,
        average_parameter_jacobian=True,
    )
    curvature(case.params, case.batch)
    hidden = case.model[0](case.batch[0]).detach()
    at_hidden = torch.func.hessian(lambda z: case.loss.criterion(case.model[1:](z), case.batch))(
        hidden
    )
    torch.testing.assert_close(seen[-1].hessian, at_hidden.reshape(8, 8))
    share = torch.softmax(case.model(case.batch[0]).detach(), 1)[0]
    torch.testing.assert_close(seen[0].hessian, torch.diag(share) - torch.outer(share, share))


def refused(make, *shape: int, examples: int = 2, **options) -> None:
    case = net(make, *shape, examples=examples)
    hf.kronecker.hbp(case.loss, case.model, **options)(case.params, case.batch)


class TwoUses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * torch.sigmoid(y)


class OverExamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).flip(0)


class Untouched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (TwoUses, ValueError, "'layer.weight' is used more than once"),
        (ByValue, NotImplementedError, "cannot be traced"),
        (OwnParameter, NotImplementedError, "'shift' is used outside a module"),
        (Gate, NotImplementedError, "at 'mul'.* product"),
        (Untouched, ValueError, "does not depend on parameter 'unused.weight'"),
        (OverExamples, NotImplementedError, "at 'flip': the output for one example alone"),
    ],
    ids=["twice", "by value", "own parameter", "gate", "unused", "over examples"],
)
def test_models_that_are_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        refused(make, 3)


def test_tied_weights_are_refused() -> None:
    model = TiedHead().double()
    model_fn, params = hf.functional(model)
    tokens = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    loss = hf.supervised(lambda p, x: model_fn(p, x), lambda z, y: z.square().mean())
    with pytest.raises(ValueError, match="more than once"):
        hf.kronecker.hbp(loss, model)(params, (tokens, tokens))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.Dropout])
def test_train_mode_is_refused(layer: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer(3) if layer is nn.BatchNorm1d else layer())
    model_fn, params = hf.functional(model.train())
    loss = hf.supervised(model_fn, F.mse_loss)
    with pytest.raises(ValueError, match="call `model.eval\\(\\)` before"):
        hf.kronecker.hbp(loss, model)(params, (torch.zeros(2, 3), torch.zeros(2, 3)))


def test_a_matrix_that_does_not_fit_is_refused_before_it_is_made() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 1, 3), nn.Flatten())
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    inputs = torch.zeros(1, 3, 100, 100)
    with pytest.raises(MemoryError, match=r"614656 x 614656 entries at .0., takes .* GiB.*pchvp"):
        hf.kronecker.hbp(loss, model)(params, (inputs, model(inputs).detach()))


def test_wrong_options() -> None:
    case = eight_rows()
    with pytest.raises(ValueError, match="residual='positive'"):
        hf.kronecker.hbp(case.loss, case.model, residual="positive")
    with pytest.raises(ValueError, match="max_blocks=0"):
        hf.kronecker.hbp(case.loss, case.model, max_blocks=0)
    with pytest.raises(TypeError, match="two halves"):
        hf.kronecker.hbp(lambda params, batch: 0.0, case.model)


def test_loss_of_another_model_or_with_other_outputs() -> None:
    case, other = eight_rows(), eight_rows()
    with pytest.raises(ValueError, match="calls the model 0 times"):
        hf.kronecker.hbp(case.loss, other.model)(case.params, case.batch)
    twice = hf.Loss(lambda p, b: 2 * case.loss.outputs(p, b), case.loss.criterion)
    with pytest.raises(ValueError, match="move casts and other operations"):
        hf.kronecker.hbp(twice, case.model)(case.params, case.batch)


def test_the_model_and_its_inputs_stay_as_they_are() -> None:
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), Residual(nn.Linear(5, 5))),
        4,
        examples=3,
    )
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    inputs = case.batch[0].clone()
    stream = torch.random.get_rng_state()
    hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    assert torch.equal(stream, torch.random.get_rng_state())
    assert torch.equal(inputs, case.batch[0])
    assert all(torch.equal(v, before[n]) for n, v in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())
    assert not case.model._forward_hooks


STRUCTURED = {
    "hbp": hf.kronecker.hbp,
    "kfra": hf.kronecker.kfra,
    "kflr": hf.kronecker.kflr,
    "kfac": partial(hf.kronecker.kfac, seed=0),
    "ekfac": hf.kronecker.ekfac,
}


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("within", [False, True])
def test_a_compiled_model_is_refused_for_the_plain_one(name: str, within: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = torch.randn(6, 4).double(), torch.arange(6) % 3
    compiled = torch.compile(model, backend="eager")
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    given = nn.Sequential(compiled) if within else compiled
    place = r"model\.0" if within else "model"
    with pytest.raises(
        NotImplementedError, match=rf"{place} is compiled.*take `{place}\._orig_mod`"
    ):
        STRUCTURED[name](loss, given)
    plain = (given[0] if within else given)._orig_mod
    found = STRUCTURED[name](loss, plain)(params, batch)
    assert found["2.bias"].trace() == STRUCTURED[name](loss, model)(params, batch)["2.bias"].trace()


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_model_that_is_compiled_in_place_is_taken(name: str) -> None:
    def blocks(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        if compiled:
            model.compile(backend="eager")
            model[0].compile(backend="eager")
        batch = torch.randn(6, 4).double(), torch.arange(6) % 3
        model_fn, params = hf.functional(model)
        curvature = STRUCTURED[name](hf.supervised(model_fn, F.cross_entropy), model)
        return torch.stack([block.dense().trace() for block in curvature(params, batch).values()])

    torch.testing.assert_close(blocks(True), blocks(False))
