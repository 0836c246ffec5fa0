"""Sampled Fisher matrices, and criteria that are likelihoods."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import case
from tests.reference import gauss_newton, gradient, matrix, relative_error, rows
from tests.transforms.problem import batches, net


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("criterion", "targets", "outputs"),
    [
        (F.cross_entropy, torch.arange(5) % 3, 3),
        (nn.CrossEntropyLoss(ignore_index=1), torch.arange(5) % 3, 3),
        (nn.CrossEntropyLoss(reduction="sum"), torch.arange(5) % 3, 3),
        (nn.MSELoss(), torch.zeros(5, 3).double(), 3),
        (nn.MSELoss(reduction="sum"), torch.zeros(5, 3).double(), 3),
        (nn.BCEWithLogitsLoss(), torch.ones(5, 2).double(), 2),
    ],
)
def test_monte_carlo_fisher_is_unbiased(
    criterion: Any, targets: Tensor, outputs: int, samples: int
) -> None:
    found = net(criterion, targets, outputs)
    exact = matrix(hf.fvp(found.loss)(found.params, found.batch), found.params)
    v = rows(hf.random_like(found.params, 3, seed=0))
    draws = []
    for seed in range(60):
        matvec = hf.fvp(found.loss, samples=samples, seed=seed)(found.params, found.batch)
        product = rows(matvec(hf.unravel(v, found.params)))
        draws.append((product @ v.mT).flatten())
    forms = torch.stack(draws)
    error = (forms.mean(0) - (v @ exact @ v.mT).flatten()).abs()
    assert (error <= 4 * forms.std(0) / 60**0.5).all()
    assert (forms.std(0) > 0).all()


def test_monte_carlo_fisher_of_one_draw_is_a_sum_of_outer_products_of_sampled_gradients() -> None:
    found = net(F.cross_entropy, torch.randint(3, (1,)))
    x, _ = found.batch
    drawn = matrix(hf.fvp(found.loss, samples=1, seed=3)(found.params, found.batch), found.params)
    of_classes = [gradient(found.loss, found.params, (x, torch.tensor([c]))) for c in range(3)]
    errors = [relative_error(drawn, g.outer(g)) for g in of_classes]
    assert min(errors) < 1e-10


def test_monte_carlo_fisher_draws_for_each_position() -> None:
    found = case("tied head")
    loss = hf.supervised(
        lambda p, x: found.loss.outputs(p, (x, None)).movedim(-1, 1), F.cross_entropy
    )
    exact = matrix(hf.fvp(loss)(found.params, found.batch), found.params)
    many = matrix(hf.fvp(loss, samples=5000, seed=0)(found.params, found.batch), found.params)
    assert relative_error(many, exact) < 0.05
    assert relative_error(exact, gauss_newton(found.loss, found.params, found.batch)) < 1e-8


def test_monte_carlo_fisher_is_the_same_in_every_pass() -> None:
    found = net(F.cross_entropy, torch.randint(3, (6,)))
    parts = batches(found, [3, 1, 2])
    v = hf.random_like(found.params, 5, seed=0)
    of_seed = [
        hf.over_batches(hf.fvp(found.loss, samples=2, seed=7), keep=keep)(found.params, parts)
        for keep in (False, True)
    ]
    first = rows(of_seed[0](v))
    torch.rand(3)
    # Other draws would differ in the first digit.
    assert relative_error(rows(of_seed[0](v)), first) < 1e-12
    assert relative_error(rows(of_seed[1](v)), first) < 1e-12
    backwards = hf.over_batches(hf.fvp(found.loss, samples=2, seed=7))(found.params, parts[::-1])
    assert relative_error(rows(backwards(v)), first) < 1e-12


def test_monte_carlo_fisher_differs_between_seeds() -> None:
    found = net(F.cross_entropy, torch.randint(3, (6,)))
    v = hf.random_like(found.params, 1, seed=0)

    def of_seed(seed: int | None) -> Tensor:
        return rows(hf.fvp(found.loss, samples=2, seed=seed)(found.params, found.batch)(v))

    assert not torch.equal(of_seed(0), of_seed(1))
    assert not torch.equal(of_seed(None), of_seed(None))


@pytest.mark.parametrize("criterion", [F.cross_entropy, F.mse_loss])
def test_monte_carlo_fisher_draws_anew_for_another_batch(criterion: Any) -> None:
    # The prediction is the same for all inputs: only the draws can differ.
    loss = hf.supervised(lambda p, x: p["b"].expand(len(x), 3), criterion)
    params = {"b": torch.tensor([0.1, -0.2, 0.3]).double()}
    targets = torch.zeros(20, 3).double() if criterion is F.mse_loss else torch.arange(20) % 3
    curvature = hf.fvp(loss, samples=1, seed=0)
    first, second, again = (
        matrix(curvature(params, (x, targets)), params)
        for x in (torch.zeros(20, 2), torch.ones(20, 2), torch.zeros(20, 2))
    )
    assert torch.equal(first, again)
    assert relative_error(first, second) > 1e-3


def test_the_draws_leave_torchs_random_stream_where_it_was() -> None:
    found = net(F.cross_entropy, torch.randint(3, (6,)))
    before = torch.get_rng_state()
    hf.fvp(found.loss, samples=2)(found.params, found.batch)(
        hf.random_like(found.params, 2, seed=0)
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: (out - y).square().mean(),
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.BCEWithLogitsLoss(weight=torch.ones(3)),
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=torch.ones(3)),
        nn.HuberLoss(),
    ],
)
def test_a_criterion_that_is_no_likelihood_has_no_fisher_matrix(
    criterion: Any, samples: int | None
) -> None:
    found = net(criterion, torch.randn(5, 3).double())
    with pytest.raises(ValueError, match="the negative logarithm of a likelihood"):
        hf.fvp(found.loss, samples=samples)


@pytest.mark.parametrize("samples", [0, -1])
def test_less_than_one_draw_is_refused(samples: int) -> None:
    found = net(F.cross_entropy, torch.randint(3, (5,)))
    with pytest.raises(ValueError, match=f"samples={samples}: it must be at least 1, or None"):
        hf.fvp(found.loss, samples=samples)
