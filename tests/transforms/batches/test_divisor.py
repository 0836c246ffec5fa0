"""Batches weighted by what their loss divides by."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.batches.halves import ReductionWarning
from tests.reference import gauss_newton, hessian, matrix, relative_error

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


Y = torch.arange(7) % 2


def net() -> tuple[Any, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.functional(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double())


CLASS_WEIGHTS = torch.tensor([1.0, 5.0], dtype=torch.float64)


IGNORED = torch.where(torch.arange(7) == 0, -100, Y)


TERMS: dict[str, tuple[Any, Tensor, Any]] = {
    "ignored targets": (F.cross_entropy, IGNORED, lambda batch: (batch[1] != -100).sum()),
    "weights of classes": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        Y,
        lambda batch: CLASS_WEIGHTS[batch[1]].sum(),
    ),
    "weights in a partial": (
        functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS),
        Y,
        lambda batch: CLASS_WEIGHTS[batch[1]].sum(),
    ),
}


OVER_DATA: dict[str, tuple[Any, Any]] = {
    "hvp": (hf.hvp, hessian),
    "ggnvp": (hf.ggnvp, gauss_newton),
    "fvp": (hf.fvp, gauss_newton),
    "pchvp, verified": (functools.partial(hf.pchvp, residual="none"), None),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("name", "curvature"),
    # Class weights have no likelihood.
    [(n, c) for n in TERMS for c in OVER_DATA if c != "fvp" or n == "ignored targets"],
)
def test_a_mean_over_targets_is_weighted_by_what_it_divides_by(
    name: str, curvature: str, keep: bool
) -> None:
    criterion, targets, weight = TERMS[name]
    model_fn, params = net()
    loss = hf.supervised(model_fn, criterion)
    # All targets of the first batch are ignored in the first case: its loss is 0 / 0.
    batches = [(X[:1], targets[:1]), (X[1:3], targets[1:3]), (X[3:], targets[3:])]
    of, right = OVER_DATA[curvature]
    found = matrix(hf.over_batches(of(loss), keep=keep)(params, batches), params)
    told = matrix(hf.over_batches(of(loss), weight=weight)(params, batches), params)
    assert relative_error(found, told) < 1e-12
    whole = matrix(of(loss)(params, (X, targets)), params)
    assert relative_error(found, whole) < 1e-9
    if right is not None:
        assert relative_error(found, right(loss, params, (X, targets))) < 1e-9


@pytest.mark.parametrize("name", TERMS)
def test_recipes_weight_a_mean_over_targets_by_what_it_divides_by(name: str) -> None:
    criterion, targets, _ = TERMS[name]
    model_fn, params = net()
    loss = hf.supervised(model_fn, criterion)
    batches = [(X[:1], targets[:1]), (X[1:3], targets[1:3]), (X[3:], targets[3:])]
    direction = {key: torch.ones_like(leaf) for key, leaf in params.items()}
    found = hf.landscape(loss, params, batches, direction, at=torch.tensor([0.0]).double())
    assert found.values.item() == pytest.approx(float(loss(params, (X, targets))), rel=1e-9)
    tracking = hf.tracking.functional_tracker(loss, rtol=1e-9)
    _, measured = tracking.measure(tracking.init(params), params, batches)
    assert measured.loss == pytest.approx(float(loss(params, (X, targets))), rel=1e-9)
    G = gauss_newton(loss, params, (X, targets))
    assert relative_error(hf.ravel(hf.ggn_diagonal(loss, params, batches)), G.diagonal()) < 1e-9


@pytest.mark.parametrize("name", TERMS)
def test_draws_of_a_mean_over_targets_ask_for_a_weight(name: str) -> None:
    criterion, targets, weight = TERMS[name]
    model_fn, params = net()
    loss = hf.supervised(model_fn, criterion)
    batches = [(X[:3], targets[:3]), (X[3:], targets[3:])]
    some = hf.draws(hf.hvp(loss), seed=0)(params, batches)
    some(0)
    with pytest.raises(ValueError, match="mean over targets.*pass the number.*`weight=lambda"):
        some(1)
    weighed = hf.draws(hf.hvp(loss), seed=0, weight=weight)(params, batches)
    mean = (matrix(weighed(0), params) + matrix(weighed(1), params)) / 2
    assert relative_error(mean, hessian(loss, params, (X, targets))) < 1e-9


def test_two_means_over_different_targets_ask_for_a_weight() -> None:
    model_fn, params = net()
    ignoring, plain = (
        hf.hvp(hf.composed(lambda p, b: model_fn(p, b[0]), F.cross_entropy, targets=targets))
        for targets in (lambda b: b[1], lambda b: b[2])
    )
    both = hf.over_batches(lambda p, b: hf.matvecs.add(ignoring(p, b), plain(p, b)))
    batches = [(X[:3], IGNORED[:3], Y[:3]), (X[3:], IGNORED[3:], Y[3:])]
    for order in (batches, batches[::-1]):
        with pytest.raises(ValueError, match="over (different )?targets.*`weight=hessfunc.examp"):
            both(params, order)(hf.random_like(params, 1, seed=0))


def test_a_batch_with_other_losses_is_not_left_out() -> None:
    model_fn, params = net()
    ignoring = hf.hvp(hf.supervised(model_fn, F.cross_entropy))
    other = hf.hvp(hf.supervised(model_fn, lambda outputs, _: outputs.square().mean()))
    batches = [(X[:1], IGNORED[:1]), (X[1:3], IGNORED[1:3]), (X[3:], IGNORED[3:])]
    both = hf.over_batches(lambda p, b: hf.matvecs.add(ignoring(p, b), other(p, b)), keep=True)
    for order in (batches, batches[::-1]):
        with pytest.raises(ValueError, match="targets"):
            both(params, order)

    def in_pieces(params: Any, batch: Any) -> Any:
        pieces = hf.microbatches(batch, 1)
        return hf.matvecs.add(
            *(hf.matvecs.scale(ignoring(params, one), 1 / len(pieces)) for one in pieces)
        )

    with pytest.raises(ValueError, match="the loss is nan"):
        hf.over_batches(in_pieces, keep=True)(params, [(X, IGNORED), (X[1:2], IGNORED[1:2])])


LENGTHS: dict[str, tuple[Any, Any]] = {
    "classes": (F.cross_entropy, lambda out: out[..., 0].long().abs() % 2),
    "probabilities": (F.cross_entropy, lambda out: out.softmax(1)),
    "entries": (F.mse_loss, torch.cos),
    "entries of a module": (nn.L1Loss(), torch.cos),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_mean_over_positions_is_weighted_by_their_number(name: str) -> None:
    criterion, of = LENGTHS[name]
    model_fn, params = hf.functional(nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double())

    def outputs(params: Any, batch: Any) -> Tensor:
        found = model_fn(params, batch[0])
        return found.movedim(-1, 1) if criterion is F.cross_entropy else found

    loss = hf.composed(outputs, criterion, targets=lambda batch: batch[1])
    x = X[:6].view(2, 3, 3)

    def batch(inputs: Tensor) -> tuple[Tensor, Tensor]:
        targets = of(inputs) if name == "classes" else of(outputs(params, (inputs,)).detach() + 1)
        return inputs, targets

    batches = [batch(x), batch(x[:, :1])]
    entries = [b[1].numel() for b in batches]
    right = sum(n * hessian(loss, params, b) for n, b in zip(entries, batches, strict=True))
    found = matrix(hf.over_batches(hf.hvp(loss))(params, batches), params)
    assert relative_error(found, right / sum(entries)) < 1e-9


@pytest.mark.parametrize("keep", [False, True])
def test_batches_of_other_lengths_are_told_where_the_loss_may_average_over_positions(
    keep: bool,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
    model_fn, params = hf.functional(model)
    v = hf.random_like(params, 1, seed=0)

    def tokens(n: int, length: int) -> dict[str, Tensor]:
        return {"ids": torch.randint(5, (n, length)), "labels": torch.randint(5, (n, length))}

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(
            model_fn(params, batch["ids"]).flatten(0, 1), batch["labels"].flatten()
        )

    curvature = hf.over_batches(hf.hvp(loss), keep=keep)
    with pytest.warns(ReductionWarning, match="has 7 positions per example and another has 4"):
        curvature(params, [tokens(2, 7), tokens(2, 4), tokens(2, 3)])(v)
    # Batches of one length, and a loss with one target an example, are as before.
    curvature(params, [tokens(2, 7), tokens(4, 7)])(v)
    classified = hf.supervised(
        lambda p, x: model_fn(p, x).mean(1), lambda o, t: F.cross_entropy(o, t)
    )
    batches = [(torch.randint(5, (4, length)), torch.arange(4)) for length in (3, 6)]
    hf.over_batches(hf.hvp(classified))(params, batches)(v)
    weighted = hf.over_batches(hf.hvp(loss), weight=lambda batch: batch["labels"].numel())
    weighted(params, [tokens(2, 7), tokens(2, 4)])(v)
