from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.output_gradients import LinearCriterionWarning
from tests.cases import NAMES, Case, case, closed_form
from tests.reference import gauss_newton, gradient, jacobian, matrix, relative_error, rows
from tests.reference.fisher import bernoulli_fisher, categorical_fisher, normal_fisher
from tests.transforms.problem import CURVATURES, batches, net, of_dicts, of_examples

# Conv, attention, residual and regression nets, whose examples do not see each other.
NETS = ("conv", "scaled dot product attention", "residual", "mse loss")


def uneven(found: Case) -> list[tuple[Tensor, Tensor]]:
    """The batch of a case cut into two of unequal size."""
    count = len(found.batch[1])
    return batches(found, [count - 1, 1])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt2"])
def test_ggn_equals_its_definition(name: str) -> None:
    found = case(name)
    product = matrix(hf.ggnvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(product, gauss_newton(found.loss, found.params, found.batch)) < 1e-8


def test_ggn_of_a_causal_language_model_equals_its_definition() -> None:
    found = case("gpt2")
    logits = hf.composed(
        lambda p, batch: found.loss.outputs(p, batch).logits,
        lambda z, batch: F.cross_entropy(z[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten()),
    )
    product = matrix(hf.ggnvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(product, gauss_newton(logits, found.params, found.batch)) < 1e-8


@pytest.mark.parametrize("name", NETS)
def test_ggn_of_batches_of_unequal_size_is_that_of_all_examples(name: str) -> None:
    found = case(name)
    product = hf.over_batches(hf.ggnvp(found.loss))(found.params, uneven(found))
    expected = gauss_newton(found.loss, found.params, found.batch)
    assert relative_error(matrix(product, found.params), expected) < 1e-8


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("of", CURVATURES)
def test_products_do_not_depend_on_how_a_block_is_cut(of: str, chunk_size: Any, k: int) -> None:
    found = net(F.cross_entropy, torch.randint(3, (6,)))
    kind = CURVATURES[of]
    v = hf.random_like(found.params, k, seed=0)
    cut = kind(found.loss, chunk_size=chunk_size)(found.params, found.batch)(v)  # type: ignore[call-arg]
    dense = matrix(kind(found.loss)(found.params, found.batch), found.params)
    assert relative_error(rows(cut), rows(v) @ dense) < 1e-10


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        ("linear regression", F.mse_loss),
        ("linear regression", lambda out, y: (out - y).square().mean()),
        ("logistic regression", F.binary_cross_entropy_with_logits),
        ("softmax regression", F.cross_entropy),
        ("softmax regression", lambda out, y: F.nll_loss(out.log_softmax(1), y)),
    ],
)
def test_ggn_of_a_linear_model_is_the_hessian(name: str, criterion: Any) -> None:
    problem = closed_form(name)

    def model_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        (w,) = params.values()
        return x @ w.T if w.dim() == 2 else x @ w

    loss = hf.supervised(model_fn, criterion)
    found = matrix(hf.ggnvp(loss)(problem.params, problem.batch), problem.params)
    assert (found - problem.hessian).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["conv", "scaled dot product attention", "residual"])
@pytest.mark.parametrize("of", ["ggnvp", "efvp"])
def test_smallest_eigenvalue_is_not_negative(name: str, of: str) -> None:
    found = case(name)
    product = matrix(CURVATURES[of](found.loss)(found.params, found.batch), found.params)
    assert relative_error(product.mT, product) < 1e-10
    values = torch.linalg.eigvalsh((product + product.mT) / 2)
    assert values[0] >= -1e-10 * values[-1]


@pytest.mark.parametrize("of", CURVATURES)
def test_smallest_ritz_value_is_not_negative(of: str) -> None:
    found = case("conv")
    matvec = CURVATURES[of](found.loss)(found.params, found.batch)
    ends = hf.lanczos(matvec, found.params, k=2, which="BE", seed=0).values
    assert ends.max() > 0
    assert ends.min() >= -1e-10 * ends.max()


def test_ggn_of_held_parameters_is_a_diagonal_block() -> None:
    found = case("mlp")
    head, rest = hf.split(found.params, "2.*")
    whole = gauss_newton(found.loss, found.params, found.batch)
    n = hf.ravel(head).numel()
    product = matrix(hf.ggnvp(hf.hold(found.loss, rest))(head, found.batch), head)
    assert relative_error(product, whole[-n:, -n:]) < 1e-10


@pytest.mark.parametrize("of", CURVATURES)
def test_float32_products_are_near_those_of_float64(of: str) -> None:
    found = net(F.cross_entropy, torch.randint(3, (6,)))
    single = {name: leaf.float() for name, leaf in found.params.items()}
    x, y = found.batch
    # The draws are those of a batch: it must be the same in both.
    x = x.float()
    kind = CURVATURES[of](found.loss)
    product = matrix(kind(single, (x, y)), single)
    assert product.dtype == torch.float32
    expected = matrix(
        kind({n: p.double() for n, p in single.items()}, (x.double(), y)), found.params
    )
    assert relative_error(product.double(), expected) < 1e-5


def test_ggn_of_a_loss_over_points_without_targets() -> None:
    model_fn, params = hf.functional(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)))
    params = {name: leaf.double() for name, leaf in params.items()}

    def residuals(p: Any, points: Tensor) -> Tensor:
        def u(t: Tensor) -> Tensor:
            return model_fn(p, t[None])[0]

        slope = torch.vmap(torch.func.jacrev(u))(points)[:, 0]
        return slope + torch.vmap(u)(points)

    loss = hf.composed(residuals, lambda r, _: r.square().mean())
    points = torch.linspace(0, 1, 6).double()[:, None]
    J = jacobian(lambda p: residuals(p, points), params)
    found = matrix(hf.ggnvp(loss)(params, points), params)
    assert relative_error(found, 2 / 6 * J.mT @ J) < 1e-8


def test_targets_may_be_the_batch_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    model_fn, params = hf.functional(model)
    autoencoder = hf.composed(model_fn, F.mse_loss)
    paired = hf.supervised(model_fn, F.mse_loss)
    x = torch.randn(6, 3).double()
    for kind in (hf.ggnvp, hf.fvp, hf.efvp):
        found = matrix(kind(autoencoder)(params, x), params)
        assert relative_error(found, matrix(kind(paired)(params, (x, x)), params)) < 1e-12
    sampled = matrix(hf.fvp(autoencoder, samples=20_000, seed=0)(params, x), params)
    assert relative_error(sampled, matrix(hf.fvp(autoencoder)(params, x), params)) < 0.05


def test_classes_may_be_the_batch_itself() -> None:
    embedding = torch.randn(5, 4).double()
    loss = hf.composed(lambda p, tokens: embedding[tokens] @ p["w"], F.cross_entropy)
    params, tokens = {"w": torch.randn(4, 5).double()}, torch.tensor([3, 1, 4, 1])
    gradients = [gradient(loss, params, token[None]) for token in tokens]
    found = matrix(hf.efvp(loss)(params, tokens), params)
    assert relative_error(found, sum(g.outer(g) for g in gradients) / 4) < 1e-8


def likelihood(name: str) -> tuple[Case, Tensor]:
    """A net with a criterion that is a likelihood, and its Fisher matrix by definition."""
    match name:
        case "cross-entropy":
            found = net(F.cross_entropy, torch.randint(3, (5,)))
            return found, categorical_fisher(found)
        case "mse":
            found = net(F.mse_loss, torch.randn(5, 3).double())
            return found, normal_fisher(found)
        case _:
            found = net(F.binary_cross_entropy_with_logits, torch.rand(5, 1).double(), outputs=1)
            return found, bernoulli_fisher(found)


LIKELIHOODS = ("cross-entropy", "mse", "bce")


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_exact_fisher_equals_its_definition_and_the_ggn(name: str) -> None:
    found, expected = likelihood(name)
    fisher = matrix(hf.fvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(fisher, expected) < 1e-8
    ggn = matrix(hf.ggnvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(fisher, ggn) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_empirical_fisher_is_the_mean_of_outer_products_of_gradients(name: str) -> None:
    found = case(name)
    gradients = of_examples(found)
    expected = sum(g.outer(g) for g in gradients) / len(gradients)
    product = matrix(hf.efvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(product, expected) < 1e-8
    parts = hf.over_batches(hf.efvp(found.loss))(found.params, uneven(found))
    assert relative_error(matrix(parts, found.params), expected) < 1e-8


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.MSELoss(reduction="sum"), torch.linspace(-1, 1, 18).double().view(6, 3)),
        (nn.BCEWithLogitsLoss(), torch.linspace(0, 1, 18).double().view(6, 3)),
        (nn.CrossEntropyLoss(label_smoothing=0.2), torch.arange(6) % 3),
        (nn.CrossEntropyLoss(reduction="sum"), torch.arange(6) % 3),
        (F.cross_entropy, torch.softmax(torch.arange(18).double().view(6, 3).sin(), 1)),
        (lambda out, y: (out - y).abs().sum(1).mean(), torch.ones(6, 3).double()),
    ],
)
def test_empirical_fisher_of_other_criteria(criterion: Any, targets: Tensor) -> None:
    found = net(criterion, targets)
    expected = sum(g.outer(g) for g in of_examples(found))
    if getattr(criterion, "reduction", "mean") == "mean":
        expected = expected / 6
    product = matrix(hf.efvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(product, expected) < 1e-8


def test_outputs_of_several_numbers_of_examples_have_no_empirical_fisher() -> None:
    loss = hf.composed(
        lambda p, _: (p["w"][:2], p["w"]), lambda out, _: out[0].sum() * out[1].sum()
    )
    with pytest.raises(ValueError, match=r"first axes of different lengths \[2, 3\]"):
        hf.efvp(loss)({"w": torch.ones(3)}, None)


class Bags(nn.Module):
    """Maxima of embeddings, then logits."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(7, 4, mode="max"), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bags(tokens))


@pytest.mark.parametrize("of", CURVATURES)
@pytest.mark.parametrize(
    ("model", "x", "operation"),
    [
        (Bags(), torch.randint(7, (5, 2)), "_embedding_bag"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.Hardsigmoid(), nn.Linear(3, 3)),
            torch.linspace(-1, 1, 20).view(5, 4),
            "hardsigmoid",
        ),
    ],
    ids=["embedding bag", "hardsigmoid"],
)
def test_an_operation_without_second_derivative_is_named(
    model: nn.Module, x: Tensor, operation: str, of: str
) -> None:
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    fix = rf"{operation} has no second derivative.*`hvp\(loss, mode='difference'\)`"
    with pytest.raises(NotImplementedError, match=fix):
        CURVATURES[of](loss)(params, (x, torch.arange(5) % 3))(hf.random_like(params, 2, seed=0))


def test_ctc_is_named_by_the_ggn_and_has_an_empirical_fisher() -> None:
    def criterion(out: Tensor, y: Tensor) -> Tensor:
        lengths = torch.full((len(out),), out.shape[1]), torch.full((len(out),), y.shape[1])
        return F.ctc_loss(out.log_softmax(-1).movedim(1, 0), y, *lengths)

    model_fn, params = hf.functional(nn.Linear(4, 3).double())
    loss = hf.supervised(model_fn, criterion)
    x, y = torch.randn(2, 6, 4).double(), torch.tensor([[1, 2], [2, 1]])
    with pytest.raises(NotImplementedError, match="_ctc_loss has no second derivative"):
        matrix(hf.ggnvp(loss)(params, (x, y)), params)
    gradients = [gradient(loss, params, (x[b, None], y[b, None])) for b in range(2)]
    expected = sum(g.outer(g) for g in gradients) / 2
    assert relative_error(matrix(hf.efvp(loss)(params, (x, y)), params), expected) < 1e-8


def test_known_criteria_stay_known_with_targets_of_dicts() -> None:
    known, params, batch = of_dicts(F.cross_entropy, targets=lambda b: b["y"])
    custom, _, _ = of_dicts(lambda outputs, b: F.cross_entropy(outputs, b["y"]))
    custom = hf.Loss(known.outputs, custom.criterion)
    assert known(params, batch) == custom(params, batch)
    found, expected = (matrix(hf.ggnvp(of)(params, batch), params) for of in (known, custom))
    assert relative_error(found, expected) < 1e-12
    assert relative_error(matrix(hf.fvp(known)(params, batch), params), expected) < 1e-12


def test_an_output_that_enters_linearly_beside_a_curved_one_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    model_fn, params = hf.functional(model)
    x, y = torch.randn(5, 3).double(), torch.arange(5) % 4

    def outputs(params: Any, batch: Any) -> dict[str, Any]:
        logits = model_fn(params, batch[0])
        decay = sum(leaf.square().sum() for leaf in params.values())
        drift = sum(leaf.sum() for leaf in params.values())
        return {"logits": logits, "more": [decay, drift]}

    def criterion(out: dict[str, Any], batch: Any) -> Tensor:
        return F.cross_entropy(out["logits"], batch[1]) + 0.1 * out["more"][0] + out["more"][1]

    loss = hf.composed(outputs, criterion)
    curvature = hf.ggnvp(loss)
    with pytest.warns(
        LinearCriterionWarning, match=r"linear in outputs\['more'\]\[0\], at"
    ) as told:
        matvec = curvature(params, (x, y))
    assert len(told) == 1
    # Once for each ggnvp.
    curvature(params, (x, y))
    plain = hf.composed(lambda p, b: model_fn(p, b[0]), F.cross_entropy, targets=lambda b: b[1])
    expected = matrix(hf.ggnvp(plain)(params, (x, y)), params)
    assert relative_error(matrix(matvec, params), expected) < 1e-9
    # The drift is linear in the parameters, and has no curvature to be left out.
    hf.ggnvp(
        hf.composed(
            lambda p, b: (outputs(p, b)["logits"], outputs(p, b)["more"][1]),
            lambda out, b: F.cross_entropy(out[0], b[1]) + out[1],
        )
    )(params, (x, y))
