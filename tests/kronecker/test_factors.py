"""Kronecker factors: where they are exact, what they estimate, and which is nearer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.output_gradients import LinearCriterionWarning
from tests.cases import CalledTwice
from tests.kronecker.cases import Net, dense, gauss_newton_blocks, largest_error, net


def perceptron(examples: int, **options) -> Net:
    return net(
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)
        ),
        4,
        examples=examples,
        **options,
    )


def convolutional(examples: int) -> Net:
    return net(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        *(2, 4, 4),
        examples=examples,
        seed=1,
    )


def test_the_rectifier_of_the_convolutional_net_bends() -> None:
    case = convolutional(5)
    before = case.model[:2](case.batch[0])
    assert 0.2 < float((before > 0).double().mean()) < 0.8


FAMILY = {"kfra": hf.kronecker.kfra, "kflr": hf.kronecker.kflr, "ekfac": hf.kronecker.ekfac}


@pytest.mark.parametrize("family", FAMILY.values(), ids=FAMILY.keys())
def test_exact_with_one_example(family) -> None:
    case = perceptron(1)
    blocks = family(case.loss, case.model)(case.params, case.batch)
    assert largest_error(dense(blocks), gauss_newton_blocks(case)) < 1e-10


@pytest.mark.parametrize("family", FAMILY.values(), ids=FAMILY.keys())
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_exact_for_a_linear_model_with_mean_square_error(family, sharing: str) -> None:
    case = net(lambda: nn.Sequential(nn.Linear(4, 3)), 4, examples=6, criterion=F.mse_loss)
    blocks = family(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    assert largest_error(dense(blocks), gauss_newton_blocks(case)) < 1e-10


def test_expand_is_exact_where_each_position_has_a_target() -> None:
    case = net(lambda: nn.Sequential(nn.Linear(4, 3)), 5, 4, examples=6, criterion=F.mse_loss)
    blocks = hf.kronecker.kflr(case.loss, case.model, sharing="expand")(case.params, case.batch)
    assert largest_error(dense(blocks), gauss_newton_blocks(case)) < 1e-10


class MeanOfPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)


@pytest.mark.parametrize("family", FAMILY.values(), ids=FAMILY.keys())
def test_reduce_is_exact_where_positions_are_averaged(family) -> None:
    case = net(MeanOfPositions, 5, 4, examples=6, criterion=F.mse_loss)
    reduced = family(case.loss, case.model, sharing="reduce")(case.params, case.batch)
    expanded = family(case.loss, case.model, sharing="expand")(case.params, case.batch)
    exact = gauss_newton_blocks(case)
    assert largest_error(dense(reduced), exact) < 1e-10
    assert largest_error(dense(expanded), exact) > 0.1


def test_kflr_is_the_product_of_its_factors() -> None:
    """By the definition: gradients of each output's factor at each layer, example by example."""
    case = perceptron(5)
    inputs = case.batch[0]
    model = case.model
    hidden = model[:2](inputs).detach()
    outer = torch.zeros(4, 4, dtype=torch.float64)
    for b in range(5):
        jacobian = torch.func.jacrev(lambda z: model[3:](z))(model[2](hidden[b]).detach())
        share = torch.softmax(model(inputs[b]).detach(), 0)
        outer += jacobian.mT @ (torch.diag(share) - torch.outer(share, share)) @ jacobian / 5
    expected = torch.kron(outer.detach(), hidden.mT @ hidden / 5)
    block = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)["2.weight"]
    torch.testing.assert_close(block.dense(), expected)


def test_kfra_is_averaged_backpropagation() -> None:
    case = perceptron(5)
    kfra = hf.kronecker.kfra(case.loss, case.model)(case.params, case.batch)
    averaged = hf.kronecker.hbp(
        case.loss,
        case.model,
        residual="zero",
        average_input_jacobian=False,
        average_parameter_jacobian=False,
    )(case.params, case.batch)
    assert largest_error(dense(kfra), dense(averaged)) < 1e-12


def ignored(case: Net) -> Net:
    """One example does not count."""
    inputs, targets = case.batch
    return Net(case.model, case.loss, case.params, (inputs, targets.index_fill(0, LAST, -100)))


LAST = torch.tensor([3])


LIKELIHOODS = {
    "cross-entropy": perceptron(4),
    "ignored": ignored(perceptron(4)),
    "positions": net(lambda: nn.Sequential(nn.Conv1d(2, 3, 2)), 2, 4, examples=4),
    "mse": perceptron(4, criterion=F.mse_loss),
    "mse, sum": perceptron(4, criterion=partial(F.mse_loss, reduction="sum")),
    "bce": perceptron(4, criterion=F.binary_cross_entropy_with_logits),
    "bce, sum": perceptron(
        4, criterion=partial(F.binary_cross_entropy_with_logits, reduction="sum")
    ),
    "convolution": convolutional(4),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_expectation_of_kfac_is_kflr(likelihood: str) -> None:
    """500 draws in 20 groups: the mean of these within 5 standard errors, entry by entry."""
    case = LIKELIHOODS[likelihood]
    exact = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    groups = [
        hf.kronecker.kfac(case.loss, case.model, samples=25, seed=seed)(case.params, case.batch)
        for seed in range(20)
    ]
    for name, block in exact.items():
        if isinstance(block, hf.kronecker.Dense):
            drawn, expected = [group[name].matrix for group in groups], block.matrix
        else:
            drawn, expected = [group[name].left for group in groups], block.left
            torch.testing.assert_close(groups[0][name].right, block.right)
        found = torch.stack(drawn)
        error = found.std(0) / 20**0.5
        assert bool(((found.mean(0) - expected).abs() <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_ekfac_is_never_farther_than_kfac(make, sharing: str) -> None:
    case = make(5)
    for seed in range(5):
        options = {"samples": 3, "seed": seed, "sharing": sharing}
        kfac = dense(hf.kronecker.kfac(case.loss, case.model, **options)(case.params, case.batch))
        ekfac = dense(hf.kronecker.ekfac(case.loss, case.model, **options)(case.params, case.batch))
        for name, exact in sampled_fisher(case, samples=3, seed=seed).items():
            rounding = 1e-14 * exact.norm()
            assert (ekfac[name] - exact).norm() <= (kfac[name] - exact).norm() + rounding


def sampled_fisher(case: Net, *, samples: int, seed: int) -> dict[str, Tensor]:
    """The blocks of which `ekfac` has the eigenvalues, from the same draws."""
    from hessfunc.transforms.batches.checksum import batch_key
    from hessfunc.transforms.likelihoods import sampled_gradients

    outputs = case.model(case.batch[0]).detach()
    key = batch_key(seed, case.batch, outputs.device)
    columns = sampled_gradients(case.loss.criterion, outputs, case.batch, samples=samples, key=key)
    found = {
        name: torch.zeros(leaf.numel(), leaf.numel(), dtype=torch.float64)
        for name, leaf in case.params.items()
    }
    for column in columns:
        for b in range(len(outputs)):

            def along(params: dict[str, Tensor], b: int = b, column: Tensor = column) -> Tensor:
                return (case.loss.outputs(params, case.batch)[b] * column[b]).sum()

            for name, gradient in torch.func.grad(along)(case.params).items():
                found[name] += torch.outer(gradient.flatten(), gradient.flatten())
    return found


def test_ekfac_has_the_trace_of_the_gauss_newton_matrix() -> None:
    case = convolutional(5)
    blocks = hf.kronecker.ekfac(case.loss, case.model)(case.params, case.batch)
    for name, exact in gauss_newton_blocks(case).items():
        assert blocks[name].trace() == pytest.approx(float(exact.trace()), rel=1e-10)


FACTORED = {
    "kfra": hf.kronecker.kfra,
    "kflr": hf.kronecker.kflr,
    "kfac": lambda *args, **options: hf.kronecker.kfac(*args, seed=0, **options),
    "ekfac": hf.kronecker.ekfac,
    "ekfac, sampled": lambda *args, **options: hf.kronecker.ekfac(
        *args, samples=2, seed=0, **options
    ),
}


@pytest.mark.parametrize("family", FACTORED.values(), ids=FACTORED.keys())
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_inverse_logdet_and_trace(family, sharing: str, make) -> None:
    case = make(5)
    blocks = family(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    vectors = hf.random_like(case.params, 2, seed=0, kind="normal")
    there = hf.matvecs.shift(blocks, 0.05)(vectors)
    for name, found in blocks.inverse_matvec(there, 0.05).items():
        torch.testing.assert_close(found, vectors[name], rtol=1e-8, atol=1e-8)
    whole = torch.block_diag(*dense(blocks).values())
    damped = whole + 0.05 * torch.eye(len(whole), dtype=torch.float64)
    assert blocks.logdet(0.05) == pytest.approx(float(torch.logdet(damped)), rel=1e-9)
    assert blocks.trace() == pytest.approx(float(whole.trace()), rel=1e-9)


def test_draws_depend_on_the_seed_and_on_nothing_else() -> None:
    case = perceptron(5)
    stream = torch.random.get_rng_state()
    one, again, other = (
        dense(hf.kronecker.kfac(case.loss, case.model, seed=seed)(case.params, case.batch))
        for seed in (0, 0, 1)
    )
    assert largest_error(again, one) == 0
    assert largest_error(other, one) > 1e-3
    assert torch.equal(stream, torch.random.get_rng_state())


class Attention(nn.Module):
    """Any architecture goes, with weights of linear layers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = torch.softmax(q @ k.mT, -1)
        return self.head(x + weights @ v).transpose(1, 2)


def attention() -> tuple[nn.Module, hf.Loss, dict[str, Tensor], tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attention().double()
        tokens = torch.randint(7, (3, 5))
    model_fn, params = hf.functional(model)
    return model, hf.supervised(model_fn, F.cross_entropy), params, (tokens, tokens)


def test_any_architecture() -> None:
    model, loss, params, batch = attention()
    chosen, rest = hf.split(params, ["qkv.weight", "head.weight", "head.bias"])
    held = hf.hold(loss, rest)
    blocks = hf.kronecker.ekfac(held, model)(chosen, batch)
    exact = hf.ggnvp(held)(chosen, batch)
    for name, leaf in chosen.items():
        units = torch.eye(leaf.numel(), dtype=torch.float64).view(-1, *leaf.shape)
        zeros = {n: torch.zeros(leaf.numel(), *v.shape).double() for n, v in chosen.items()}
        diagonal = exact(zeros | {name: units})[name].flatten(1).diagonal()
        assert blocks[name].trace() == pytest.approx(float(diagonal.sum()), rel=1e-9)


def test_what_is_refused() -> None:
    case = perceptron(2)
    with pytest.raises(ValueError, match="sharing='both'"):
        hf.kronecker.kflr(case.loss, case.model, sharing="both")
    with pytest.raises(ValueError, match="samples=0"):
        hf.kronecker.kfac(case.loss, case.model, samples=0)
    smoothed = hf.supervised(case.loss.outputs, nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(ValueError, match="negative logarithm of a likelihood"):
        hf.kronecker.kfac(smoothed, case.model)
    with pytest.raises(ValueError, match="unsupported='zero'"):
        hf.kronecker.kflr(case.loss, case.model, unsupported="zero")
    for family in (hf.kronecker.kfac, hf.kronecker.ekfac):
        with pytest.raises(ValueError, match="fisher='mc'"):
            family(case.loss, case.model, fisher="mc")
    loss = hf.supervised(lambda params, x: case.loss.outputs({}, (x, x)), F.cross_entropy)
    with pytest.raises(ValueError, match="'0.weight' of shape .* is not a parameter on which"):
        hf.kronecker.kflr(loss, case.model)(case.params, case.batch)
    with pytest.raises(TypeError, match="two halves"):
        hf.kronecker.kflr(lambda params, batch: 0.0, case.model)


class Tied(nn.Module):
    """One weight in two modules that see inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(torch.stack([x, x.cos()], 1)).tanh().mean(1)


@pytest.mark.parametrize("make", [CalledTwice, Tied])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_has_the_trace_of_a_weight_that_is_used_more_than_once(make, sharing: str) -> None:
    case = net(make, 3, examples=4)
    made = hf.kronecker.ekfac(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    for name, block in gauss_newton_blocks(case).items():
        assert made[name].trace() == pytest.approx(float(block.trace()), rel=1e-9)
    with pytest.raises(ValueError, match="is used more than once"):
        hf.kronecker.kfra(case.loss, case.model)(case.params, case.batch)


class Mixing(nn.Module):
    """Positions that see each other, between two layers on each position."""

    def __init__(self, inner: int = 0, outer: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.inner, self.outer = inner, outer

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1) if self.inner else x
        z = torch.tanh(self.first(flat)).view(len(x), -1, 4)
        z = z.cumsum(1).cos()
        # Rows of positions, one example after another (1) or one position after another (2).
        if self.outer == 0:
            return self.second(z).movedim(-1, 1)
        return self.second((z if self.outer == 1 else z.transpose(0, 1)).flatten(0, 1))


def mixing(inner: int, outer: int) -> Net:
    targets = torch.arange(15).view(3, 5) % 3
    case = net(partial(Mixing, inner, outer), 5, 3, examples=3, criterion=F.cross_entropy)
    rows = {0: targets, 1: targets.flatten(), 2: targets.mT.flatten()}[outer]
    return replace(case, batch=(case.batch[0], rows))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("inner", "outer"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("of", [hf.kronecker.kflr, hf.kronecker.ekfac])
def test_outputs_flattened_over_positions_have_the_factors_of_those_that_are_not(
    of, inner: int, outer: int, sharing: str
) -> None:
    case = mixing(0, 0)
    expected = of(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    exact = gauss_newton_blocks(case)
    case = mixing(inner, outer)
    made = of(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    for name, block in expected.items():
        torch.testing.assert_close(made[name].dense(), block.dense())
        if of is hf.kronecker.ekfac:
            assert made[name].trace() == pytest.approx(float(exact[name].trace()), rel=1e-9)


def test_the_expectation_of_draws_is_that_of_flattened_outputs() -> None:
    case = mixing(0, 1)
    for sharing in ("expand", "reduce"):
        expected = hf.kronecker.kflr(case.loss, case.model, sharing=sharing)(
            case.params, case.batch
        )
        drawn = partial(hf.kronecker.kfac, samples=1000, seed=0, sharing=sharing)
        made = drawn(case.loss, case.model)(case.params, case.batch)
        for name, block in expected.items():
            assert made[name].trace() == pytest.approx(block.trace(), rel=0.1)


@pytest.mark.parametrize(("inner", "outer"), [(0, 2), (1, 1)])
def test_rows_that_are_not_those_of_examples_are_refused(inner: int, outer: int) -> None:
    case = mixing(inner, outer)
    for of in (hf.kronecker.kflr, hf.kronecker.ekfac):
        with pytest.raises(ValueError, match=r"rows of the outputs are not ordered by.*movedim"):
            of(case.loss, case.model)(case.params, case.batch)


def test_a_criterion_that_couples_examples_is_refused() -> None:
    case = perceptron(3, criterion=lambda out, y: (out - y).square().sum().sqrt())
    for of in (hf.kronecker.kflr, hf.kronecker.ekfac):
        with pytest.raises(ValueError, match="couple examples"):
            of(case.loss, case.model)(case.params, case.batch)


def test_factors_of_a_convolution() -> None:
    """By the definition of Grosse and Martens, from gradients and patches, example by example."""
    case = net(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        *(2, 3, 3),
        examples=4,
    )
    inputs = case.batch[0]
    patches = F.unfold(inputs, 2)
    hidden = case.model[0](inputs).detach()
    outer = torch.zeros(3, 3, dtype=torch.float64)
    for b in range(4):
        jacobian = torch.func.jacrev(lambda z: case.model[1:](z)[0])(hidden[b : b + 1])
        jacobian = jacobian.reshape(3, 3, 4).detach()
        share = torch.softmax(case.model(inputs[b : b + 1]).detach()[0], 0)
        inner = (torch.diag(share) - torch.outer(share, share)) / 4
        outer += torch.einsum("iop,ij,jap->oa", jacobian, inner, jacobian)
    expected = torch.kron(outer, torch.einsum("bkp,blp->kl", patches, patches) / 16)
    block = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)["0.weight"]
    torch.testing.assert_close(block.dense(), expected)


def test_one_output_without_an_axis() -> None:
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)),
        4,
        examples=5,
        criterion=F.mse_loss,
    )
    for family in (hf.kronecker.hbp, *FAMILY.values()):
        blocks = family(case.loss, case.model)(case.params, case.batch)
        hidden = torch.tanh(case.model[0](case.batch[0])).detach()
        if family is not hf.kronecker.hbp:
            expected = 2 * hidden.mT @ hidden / 5
            torch.testing.assert_close(blocks["2.weight"].dense(), expected)
        assert float(blocks["2.bias"].dense()) == pytest.approx(2.0)


def test_no_curvature_at_the_outputs() -> None:
    case = perceptron(3, criterion=F.l1_loss)
    for family in FAMILY.values():
        with pytest.warns(LinearCriterionWarning, match="linear in the model's outputs"):
            blocks = family(case.loss, case.model)(case.params, case.batch)
        assert blocks.trace() == 0


def test_closed_forms_of_the_user() -> None:
    case = perceptron(3, criterion=F.mse_loss)
    seven = hf.with_output_hessian(F.mse_loss, lambda outputs, _: lambda tangent: 7 * tangent)
    loss = hf.supervised(hf.functional(case.model)[0], seven)
    for family in (hf.kronecker.hbp, *FAMILY.values()):
        bias = family(loss, case.model)(case.params, case.batch)["4.bias"]
        torch.testing.assert_close(bias.dense(), 21 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("family", [hf.kronecker.hbp, *FACTORED.values()])
@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(5), nn.Dropout])
def test_train_mode_is_refused_with_its_parameters_held(family, layer) -> None:
    model = nn.Sequential(nn.Linear(4, 5), layer(), nn.Linear(5, 3)).train()
    model[1].requires_grad_(False)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    with pytest.raises(ValueError, match="'1'.* call `model.eval\\(\\)` before"):
        family(loss, model)(params, (torch.ones(3, 4), torch.tensor([0, 1, 2])))


def test_keywords_and_a_model_that_is_one_layer() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    for make in (Keywords, lambda: nn.Linear(4, 3)):
        case = net(make, 4, examples=3, criterion=F.mse_loss)
        for family in (hf.kronecker.hbp, *FAMILY.values()):
            blocks = family(case.loss, case.model)(case.params, case.batch)
            bias = list(blocks.values())[1]
            torch.testing.assert_close(bias.dense(), 2 / 3 * torch.eye(3, dtype=torch.float64))


def test_factors_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hessfunc import memory

    case = net(lambda: nn.Linear(3000, 3), 3000, examples=2)
    monkeypatch.setattr(memory, "available_memory", lambda _: 2**20)
    for family in (hf.kronecker.kfra, hf.kronecker.kflr):
        with pytest.raises(MemoryError, match="GiB"):
            family(case.loss, case.model)(case.params, case.batch)
    with pytest.raises(MemoryError, match="exact products"):
        hf.kronecker.hbp(case.loss, case.model, average_parameter_jacobian=False)(
            case.params, case.batch
        )


def test_a_positive_matrix_with_any_damping_is_invertible_in_single_precision() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 3))
        batch = 255 * torch.rand(10, 30), torch.randint(3, (10,))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    for family in FAMILY.values():
        blocks = family(loss, model)(params, batch)
        step = blocks.inverse_matvec(hf.random_like(params, 1, seed=0), 1e-6)
        assert all(bool(leaf.isfinite().all()) for leaf in step.values())
        assert blocks.logdet(1e-6) < blocks.logdet(1e-3)


def test_outputs_that_are_no_tensor_are_refused() -> None:
    case = perceptron(2)
    loss = hf.composed(
        lambda p, b: {"logits": case.loss.outputs(p, b)},
        lambda out, b: F.cross_entropy(out["logits"], b[1]),
    )
    for of in (hf.kronecker.kflr, hf.kronecker.ekfac):
        with pytest.raises(TypeError, match="outputs that are one tensor.*got dict"):
            of(loss, case.model)(case.params, case.batch)


def nearest_product(matrix: Tensor, outputs: int, inputs: int) -> Tensor:
    """The nearest Kronecker product, from the singular vectors of the rearranged matrix."""
    blocks = matrix.view(outputs, inputs, outputs, inputs).transpose(1, 2)
    left, size, right = torch.linalg.svd(blocks.reshape(outputs**2, inputs**2))
    pair = left[:, 0].view(outputs, outputs), right[0].view(inputs, inputs)
    return size[0] * torch.kron(*pair)


@pytest.mark.parametrize("shared", [False, True])
def test_factors_of_kfoc_are_the_nearest(shared: bool) -> None:
    case = net(MeanOfPositions, 5, 4, examples=4) if shared else perceptron(5)
    made = hf.kronecker.kfoc(case.loss, case.model, steps=60)(case.params, case.batch)
    for name, exact in gauss_newton_blocks(case).items():
        shape = case.params[name].shape
        expected = nearest_product(exact, shape[0], shape[1:].numel())
        torch.testing.assert_close(made[name].dense(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_each_step_of_kfoc_is_nearer(make) -> None:
    case = make(5)
    exact = gauss_newton_blocks(case)
    kflr = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    before = {name: float((block.dense() - exact[name]).norm()) for name, block in kflr.items()}
    for steps in (1, 3, 9):
        made = hf.kronecker.kfoc(case.loss, case.model, steps=steps)(case.params, case.batch)
        # A convolution with groups has no entries between its groups.
        after = {name: float((block.dense() - exact[name]).norm()) for name, block in made.items()}
        assert all(after[name] <= before[name] * (1 + 1e-9) + 1e-14 for name in exact)
        before = after


def test_kfoc_of_a_data_set_and_of_lookups() -> None:
    model, loss, params, (tokens, targets) = attention()
    curvature = hf.kronecker.kfoc(loss, model, steps=2)
    batches = [(tokens[:1], targets[:1]), (tokens[1:], targets[1:])]
    whole, made = curvature(params, (tokens, targets)), hf.over_batches(curvature)(params, batches)
    assert largest_error(dense(made), dense(whole)) < 1e-9
    kflr = hf.kronecker.kflr(loss, model)(params, (tokens, targets))["embedding.weight"]
    exact = gauss_newton_blocks(Net(model, loss, params, (tokens, targets)))["embedding.weight"]
    nearer = (whole["embedding.weight"].dense() - exact).norm()
    assert nearer < (kflr.dense() - exact).norm()
    with pytest.raises(ValueError, match="steps=0"):
        hf.kronecker.kfoc(loss, model, steps=0)
