"""Uses of parameters: each is found, or the parameter is refused or gets its exact diagonal."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.kronecker.cases import Net, gauss_newton_blocks, net


def test_calls_of_a_module_are_positions_of_one_call() -> None:
    """A layer on two tensors, one after another, is the layer on both of them stacked."""

    class Halves(nn.Module):
        def __init__(self, together: bool) -> None:
            super().__init__()
            self.layer, self.head, self.together = nn.Linear(2, 3), nn.Linear(3, 3), together

        def forward(self, x: Tensor) -> Tensor:
            if self.together:
                z = self.layer(x.unflatten(1, (2, 2)))
            else:
                z = torch.stack([self.layer(x[:, :2]), self.layer(x[:, 2:])], 1)
            return self.head(torch.tanh(z).prod(1))

    for of in (
        hf.kronecker.kflr,
        hf.kronecker.ekfac,
        partial(hf.kronecker.kfac, seed=0, samples=3),
    ):
        for sharing in ("expand", "reduce"):
            one, other = (
                of(case.loss, case.model, sharing=sharing)(case.params, case.batch)
                for case in (net(partial(Halves, t), 4, examples=3) for t in (True, False))
            )
            for name in one:
                torch.testing.assert_close(one[name].dense(), other[name].dense())


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


def traces_of(case: Net, **options) -> hf.kronecker.Blocks:
    """The blocks of `ekfac`, whose traces are those of the Gauss-Newton matrix."""
    made = hf.kronecker.ekfac(case.loss, case.model, **options)(case.params, case.batch)
    for name, block in gauss_newton_blocks(case).items():
        assert made[name].trace() == pytest.approx(float(block.trace()), rel=1e-9)
    return made


def test_parameters_in_functions_have_factors() -> None:
    made = traces_of(net(Functions, 3, examples=4))
    for name in ("layer.weight", "layer.bias", "down", "up"):
        assert not isinstance(made[name], hf.kronecker.Dense | hf.kronecker.DiagonalBlock)
    for name in ("scale", "shift"):
        assert isinstance(made[name], hf.kronecker.Dense)


class Head(nn.Module):
    """One weight of an embedding and a head, with a row for the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).cumsum(1)).movedim(-1, 1)


def tied() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Head().double()
    model_fn, params = hf.functional(model)
    tokens = torch.tensor([[0, 1, 1], [4, 0, 2]])
    return Net(model, hf.supervised(model_fn, F.cross_entropy), params, (tokens, tokens.flip(1)))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_tied_embedding_and_head(sharing: str) -> None:
    """The traces of `ekfac` are exact, with the cross terms of both uses."""
    case = tied()
    traces_of(case, sharing=sharing)
    for joint in ("apart", "joint"):
        traces_of(case, sharing=sharing, bias=joint)


def test_the_factors_of_a_tied_weight_are_nearest_to_the_sum_of_both_products() -> None:
    case, weight = tied(), "embedding.weight"
    apart = Head().double()
    apart.head.weight = nn.Parameter(apart.embedding.weight.detach().clone())
    model_fn, _ = hf.functional(apart)
    own = {weight: case.params[weight], "head.weight": case.params[weight]}
    loss = hf.supervised(model_fn, F.cross_entropy)
    parts = hf.kronecker.kflr(loss, apart)(own, case.batch)
    total = sum(parts[name].dense() for name in own)
    made = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)[weight]
    # Rows of the rearranged matrix are the blocks of the sum.
    rearranged = total.view(5, 3, 5, 3).permute(0, 2, 1, 3).reshape(25, 9)
    u, s, v = torch.linalg.svd(rearranged)
    nearest = (s[0] * torch.outer(u[:, 0], v[0])).view(5, 5, 3, 3).permute(0, 2, 1, 3)
    torch.testing.assert_close(made.dense(), nearest.reshape(15, 15))
    assert float(torch.linalg.eigvalsh(made.dense())[0]) > -1e-12
    forward = hf.kronecker.kfac(case.loss, case.model, fisher="forward-only")
    assert forward(case.params, case.batch)[weight].trace() > 0
    batches = [tuple(part[i : i + 1] for part in case.batch) for i in range(2)]
    whole = hf.over_batches(hf.kronecker.kflr(case.loss, case.model))(case.params, batches)
    torch.testing.assert_close(whole[weight].dense(), made.dense())


def test_rows_of_a_weight_by_indices_and_by_unit_vectors() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(F.embedding(x.argmax(1), self.weight) + x @ self.weight))

    traces_of(net(Both, 4, examples=5))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) @ self.weight + self.bias


def test_a_weight_and_its_transpose() -> None:
    case = net(Autoencoder, 4, examples=5, criterion=F.mse_loss)
    traces_of(case)
    error = [
        float(torch.linalg.matrix_norm(of.dense() - gauss_newton_blocks(case)["weight"]))
        for of in (
            hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)["weight"],
            hf.kronecker.kfoc(case.loss, case.model)(case.params, case.batch)["weight"],
        )
    ]
    assert error[1] < error[0]


class OfTwoKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(1) @ self.weight


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_weight_with_uses_of_different_kinds(sharing: str) -> None:
    case = net(OfTwoKinds, 3, 3, examples=4)
    with pytest.raises(NotImplementedError, match="'weight' .* its uses are of diff"):
        hf.kronecker.ekfac(case.loss, case.model)(case.params, case.batch)
    for family in (hf.kronecker.kflr, hf.kronecker.ekfac):
        curvature = family(case.loss, case.model, sharing=sharing, unsupported="diagonal")
        made = curvature(case.params, case.batch)
        assert made.diagonals == ("weight",)
        exact = gauss_newton_blocks(case)["weight"].diagonal()
        torch.testing.assert_close(made["weight"].dense(), torch.diag(exact))


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


class Attention(nn.Module):
    """Attention with its own projections, on positions first or examples first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.norm, self.batch_first = nn.LayerNorm(4), batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.norm(y + self.attention(y, y, y, need_weights=False)[0])
        return (y if self.batch_first else y.transpose(0, 1)).movedim(-1, 1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_of_positions_before_examples(sharing: str) -> None:
    """torch's attention moves the positions before the examples; either order has the blocks."""
    one, other = (
        traces_of(net(partial(Attention, first), 5, 4, examples=3), sharing=sharing)
        for first in (True, False)
    )
    assert "attention.in_proj_weight" in one
    for name in one:
        torch.testing.assert_close(one[name].dense(), other[name].dense())


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


def test_layers_with_the_same_inputs_share_their_factor() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            return self.query(x) * self.key(x) + self.value(x.cos())

    case = net(Queries, 3, examples=4)
    made = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    query, key, value = (made[f"{name}.weight"] for name in ("query", "key", "value"))
    x = torch.tanh(case.batch[0])
    torch.testing.assert_close(query.right[0], x.mT @ x / 4)
    torch.testing.assert_close(key.right, query.right, rtol=0, atol=0)
    torch.testing.assert_close(value.right[0], x.cos().mT @ x.cos() / 4)


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


def test_narrow_parameters_and_empty_batches_are_refused() -> None:
    model = nn.Linear(4, 3)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    kfac = hf.kronecker.kfac(loss, model, seed=0)
    narrow = {name: leaf.bfloat16() for name, leaf in params.items()}
    with pytest.raises(TypeError, match=r"too narrow.*`model.float\(\)`"):
        kfac(narrow, (torch.zeros(2, 4).bfloat16(), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="no examples"):
        kfac(params, (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))


def test_singular_corrected_factors_have_no_determinant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    batch = torch.randn(11, 4, dtype=torch.float64), torch.arange(11) % 3
    blocks = hf.kronecker.ekfac(loss, model)(params, batch)
    # A softmax has a zero eigenvalue, H 1 = 0.
    with pytest.raises(ValueError, match="singular"):
        blocks.logdet(0.0)
    with pytest.raises(ValueError, match="singular"):
        blocks.sample(2, 0.0, seed=0)


def test_given_weights_count_in_both_factors() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    batches, weights = [(x[:3], y[:3]), (x[3:], y[3:])], {3: 2.0, 5: 1.0}
    kflr = hf.kronecker.kflr(loss, model)
    found = hf.over_batches(kflr, weight=lambda b: weights[len(b[1])])(params, batches)
    first, second = (kflr(params, batch)["weight"] for batch in batches)
    for side in ("left", "right"):
        due = (2 * getattr(first, side) + getattr(second, side)) / 3
        assert torch.allclose(getattr(found["weight"], side), due, rtol=1e-10)


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


@pytest.mark.parametrize("targets", [[0, 3, 1, 1], [0, -1, 1, 1]])
def test_targets_that_are_no_classes_are_refused(targets: list[int]) -> None:
    case = net(Functions, 3, examples=4)
    for family in (hf.kronecker.kflr, hf.kronecker.kfac):
        with pytest.raises(ValueError, match="a target is the class"):
            family(case.loss, case.model)(case.params, (case.batch[0], torch.tensor(targets)))
