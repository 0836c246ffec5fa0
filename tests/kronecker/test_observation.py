"""Observation of uses: each is found, or the parameter is refused or gets its exact diagonal."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.kronecker.cases import Net, gauss_newton_blocks, net, traces_of


class Functions(nn.Module):
    """Weights in functions and products, transposed or not, as in a hand-written LoRA layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.down, self.up = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))
        self.scale, self.shift = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.layer(x)), self.layer.weight)
        return (1 + self.scale) * torch.tanh(x + x @ self.down @ self.up.T) - self.shift


def test_parameters_in_functions_have_factors() -> None:
    made = traces_of(net(Functions, 3, examples=4))
    for name in ("layer.weight", "layer.bias", "down", "up"):
        assert not isinstance(made[name], hf.kronecker.Dense | hf.kronecker.DiagonalBlock)
    for name in ("scale", "shift"):
        assert isinstance(made[name], hf.kronecker.Dense)


class Grown(nn.Module):
    """A weight that enters its layer through a function that is not linear in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.layer.weight.exp()))).movedim(-1, 1)


@pytest.mark.parametrize("flat", [False, True])
def test_parameters_without_factors_have_exact_diagonals(flat: bool) -> None:
    case = net(Grown, 4, 3, examples=3)
    case.params.pop("layer.bias")
    if flat:
        outputs = case.loss.outputs
        rows = hf.composed(
            lambda p, b: outputs(p, b).movedim(1, -1).flatten(0, 1),
            F.cross_entropy,
            targets=lambda b: b[1].flatten(),
        )
        case = Net(case.model, rows, case.params, case.batch)
    with pytest.raises(NotImplementedError, match=r"'layer.weight'.* argument of exp"):
        hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    made = traces_of(case, unsupported="diagonal")
    assert made.diagonals == ("layer.weight",)
    exact = gauss_newton_blocks(case)["layer.weight"].diagonal()
    torch.testing.assert_close(made["layer.weight"].dense(), torch.diag(exact))


class Positions(nn.Module):
    """Positions that all examples share, from an embedding and from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.offset = nn.Parameter(torch.randn(1, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x + self.embedding(torch.arange(4)[None]))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.offset
        return self.head(torch.tanh(x).cumsum(1)).movedim(-1, 1)


def test_positions_that_examples_share() -> None:
    made = traces_of(net(Positions, 4, 3, examples=3))
    assert not made.diagonals


@pytest.mark.parametrize("examples", [3, 4])
def test_positions_without_an_axis_of_examples(examples: int) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x + self.embedding(torch.arange(4)))
            return self.head(x.cumsum(1)).movedim(-1, 1)

    case = net(Flat, 4, 3, examples=examples)
    made = traces_of(case, unsupported="diagonal")
    # As many positions as examples are not told from rows of examples.
    assert made.diagonals == (() if examples == 3 else ("embedding.weight",))


def test_shared_positions_are_compared_once_for_each_shape_of_a_batch() -> None:
    case, calls = net(Positions, 4, 3, examples=4), []

    def outputs(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(len(batch[0]))
        return case.loss.outputs(params, batch)

    loss = hf.composed(outputs, F.cross_entropy, targets=lambda batch: batch[1])
    curvature = hf.kronecker.kfac(loss, case.model, seed=0)
    x, y = case.batch
    for rows in (slice(4), slice(4), slice(3), slice(4)):
        curvature(case.params, (x[rows], y[rows]))
    assert calls == [4, 4, 4, 3, 3, 4]


def test_outputs_that_are_changed_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.first(x)
            z += 1
            return self.head(torch.tanh_(z.mul_(2)))

    traces_of(net(InPlace, 3, examples=4))


def test_weights_cast_to_another_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model_fn, params = hf.functional(model, dtype=torch.float64)
    batch = torch.randn(3, 3), torch.arange(3)
    made = hf.kronecker.kflr(hf.supervised(model_fn, F.cross_entropy), model)(params, batch)
    model_fn, wide = hf.functional(model.double())
    exact = hf.kronecker.kflr(hf.supervised(model_fn, F.cross_entropy), model)(
        wide, (batch[0].double(), batch[1])
    )
    for name, block in exact.items():
        torch.testing.assert_close(made[name].dense().double(), block.dense(), rtol=1e-5, atol=1e-7)


class Shared(nn.Module):
    """Net with a lookup of a single row, which enters as a factor or a term."""

    def __init__(self, enters: str) -> None:
        super().__init__()
        self.inner, self.row = nn.Linear(4, 3), nn.Embedding(2, 3)
        self.enters = enters

    def forward(self, x: Tensor) -> Tensor:
        row, hidden = self.row(torch.zeros(1, dtype=torch.long)), self.inner(x)
        if self.enters == "sum":
            return hidden * row.square().sum()
        if self.enters == "class token":
            return hidden + row.expand(len(x), 3)
        return torch.cat([h + row for h in hidden])


@pytest.mark.parametrize("enters", ["sum", "class token", "loop"])
def test_shared_rows_do_not_change_the_outputs(enters: str) -> None:
    torch.manual_seed(0)
    model = Shared(enters).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    batch = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    blocks = hf.kronecker.ekfac(loss, model, unsupported="diagonal")(params, batch)
    dense = hf.matrix(hf.ggnvp(loss)(params, batch), params, rows="inner.*", columns="inner.*")
    found = blocks["inner.weight"].trace() + blocks["inner.bias"].trace()
    assert found == pytest.approx(float(dense.trace()), rel=1e-8)


def test_sequences_of_one_token() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.words(tokens.T).sum(0))

    torch.manual_seed(0)
    model = Bag().double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    batch = torch.tensor([[0], [3], [3], [5]]), torch.tensor([0, 1, 2, 0])
    blocks = hf.kronecker.ekfac(loss, model, unsupported="diagonal")(params, batch)
    dense = hf.matrix(hf.ggnvp(loss)(params, batch), params)
    assert blocks.trace() == pytest.approx(float(dense.trace()), rel=1e-8)


class Squares(torch.autograd.Function):
    """The product x W' by a function of autograd of its own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Unseen(nn.Module):
    """A weight in a place that modes of torch functions do not see."""

    def __init__(self, use) -> None:
        super().__init__()
        self.weight, self.head, self.use = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(x, self.weight)))


UNSEEN = {
    "autograd.Function": Squares.apply,
    "vmap": lambda x, w: torch.func.vmap(lambda row: w @ row)(x),
    "jvp": lambda x, w: torch.func.jvp(lambda v: x @ v.T, (w,), (w,))[1],
}


@pytest.mark.parametrize("place", UNSEEN)
def test_unseen_uses_are_called_so(place: str) -> None:
    case = net(partial(Unseen, UNSEEN[place]), 3, examples=4)
    with pytest.raises(NotImplementedError, match="'weight' .* no function of torch is seen"):
        hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    assert traces_of(case, unsupported="diagonal").diagonals == ("weight",)


def test_a_parameter_without_effect_is_called_so() -> None:
    case = net(partial(Unseen, lambda x, w: x @ x.new_ones(3, 4)), 3, examples=4)
    with pytest.raises(ValueError, match="'weight' .* not a parameter on which the outputs"):
        hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)


class TimeMajor(nn.Module):
    """Time before the examples, which are first in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).prod(0))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("times", [2, 3, 4, 8])
def test_time_before_examples(times: int, sharing: str) -> None:
    """The number of examples is that of the outputs, also where that of the times divides it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = TimeMajor().double(), torch.randn(times, 4, 3).double()
    model_fn, params = hf.functional(model)
    loss, y = hf.supervised(model_fn, F.cross_entropy), torch.arange(4) % 3
    made = traces_of(Net(model, loss, params, (x, y)), sharing=sharing)
    first = hf.supervised(lambda p, x: model_fn(p, x.transpose(0, 1)), F.cross_entropy)
    right = traces_of(Net(model, first, params, (x.transpose(0, 1), y)), sharing=sharing)
    for name in made:
        torch.testing.assert_close(made[name].dense(), right[name].dense())
