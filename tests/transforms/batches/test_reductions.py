"""Whether the batches of a data set are averaged or summed."""

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.reference import gauss_newton, gradient, hessian, matrix, relative_error
from tests.transforms.batches.reductions import BATCHES, X, Y, net, per_row

CRITERIA = {
    "function": functools.partial(F.cross_entropy, reduction="sum"),
    "module": nn.CrossEntropyLoss(reduction="sum"),
    "own": per_row("sum"),
    "own Hessian": hf.with_output_hessian(
        nn.CrossEntropyLoss(reduction="sum"),
        lambda out, y: (
            lambda v: torch.func.jvp(
                torch.func.grad(lambda z: F.cross_entropy(z, y, reduction="sum")), (out,), (v,)
            )[1]
        ),
    ),
}


TRACES = {
    "hvp": lambda loss, model, params, batches: matrix(
        hf.over_batches(hf.hvp(loss))(params, batches), params
    ),
    "hvp, kept": lambda loss, model, params, batches: matrix(
        hf.over_batches(hf.hvp(loss), keep=True)(params, batches), params
    ),
    "ggnvp": lambda loss, model, params, batches: matrix(
        hf.over_batches(hf.ggnvp(loss))(params, batches), params
    ),
    "efvp": lambda loss, model, params, batches: matrix(
        hf.over_batches(hf.efvp(loss))(params, batches), params
    ),
}


def right(name: str, loss: hf.Loss, params: dict[str, Tensor]) -> Tensor:
    """The matrix of the sum over all examples."""
    if name == "ggnvp":
        return gauss_newton(loss, params, (X, Y))
    if name == "efvp":
        each = [gradient(loss, params, (X[i : i + 1], Y[i : i + 1])) for i in range(7)]
        return sum((g.outer(g) for g in each), torch.zeros(()))
    return hessian(loss, params, (X, Y))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", TRACES)
def test_batches_of_a_sum_are_summed(name: str, criterion: str) -> None:
    model, model_fn, params = net()
    loss = hf.supervised(model_fn, CRITERIA[criterion])
    found = TRACES[name](loss, model, params, BATCHES)
    assert relative_error(found, right(name, loss, params)) < 1e-8


def test_every_curvature_of_a_sum_is_summed() -> None:
    model, model_fn, params = net()
    loss = hf.supervised(model_fn, nn.CrossEntropyLoss(reduction="sum"))
    G, H = gauss_newton(loss, params, (X, Y)), hessian(loss, params, (X, Y))
    for of in (hf.fvp, functools.partial(hf.pchvp, residual="zero")):
        found = matrix(hf.over_batches(of(loss))(params, BATCHES), params)
        assert float(found.trace()) == pytest.approx(float(G.trace()), rel=1e-9)
    found = matrix(hf.over_batches(hf.functional_hvp(loss))(params, BATCHES), params)
    assert relative_error(found, H - G) < 1e-9
    found = matrix(hf.over_batches(hf.kronecker.ekfac(loss, model))(params, BATCHES), params)
    assert float(found.trace()) == pytest.approx(float(G.trace()), rel=1e-9)
    diagonal = hf.ggn_diagonal(loss, params, BATCHES)
    assert relative_error(hf.ravel(diagonal), G.diagonal()) < 1e-9
    trace = hf.hessian_trace(loss, params, BATCHES, max_matvecs=300, seed=0)
    low, high = trace.interval(0.999)
    assert low - 1e-9 <= float(H.trace()) <= high + 1e-9
    blocks = hf.block_spectra(loss, params, BATCHES, algorithm=matrix)
    assert relative_error(blocks["0.weight"], H[:9, :9]) < 1e-9


@pytest.mark.parametrize("replace", [False, True])
def test_draws_of_a_sum_are_unbiased(replace: bool) -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, per_row("sum"))
    some = hf.draws(hf.hvp(loss), seed=0, replace=replace)(params, BATCHES)
    # Without replacement each batch is drawn once a pass.
    drawn = torch.tensor([1.0, 4.0, 2.0] if replace else [1.0, 1.0, 1.0], dtype=torch.float64)
    shares = drawn / drawn.sum()
    by_place: dict[int, Tensor] = {}
    for i in range(60):
        by_place.setdefault(some.batch(i), matrix(some(i), params))
    mean = sum(shares[place] * found for place, found in by_place.items())
    assert relative_error(mean, hessian(loss, params, (X, Y))) < 1e-9


def test_a_tracked_sum_is_the_loss_and_the_curvature_of_the_sum() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, per_row("sum"))
    tracking = hf.tracking.functional_tracker(loss, rtol=1e-9, critical=True)
    _, measured = tracking.measure(tracking.init(params), params, BATCHES)
    whole = hf.tracking.functional_tracker(loss, rtol=1e-9, critical=True)
    _, expected = whole.measure(whole.init(params), params, [(X, Y)])
    assert measured.loss == pytest.approx(float(loss(params, (X, Y))), rel=1e-9)
    top = torch.linalg.eigvalsh(hessian(loss, params, (X, Y)))[-1]
    assert measured.top[0] == pytest.approx(float(top), rel=1e-6)
    assert measured.critical == pytest.approx(expected.critical, rel=1e-6)


def test_held_parameters_and_a_regulariser_change_nothing() -> None:
    _, model_fn, params = net()
    chosen, rest = hf.split(params, "0.*")
    loss = hf.hold(hf.supervised(model_fn, nn.CrossEntropyLoss(reduction="sum")), rest)
    found = matrix(hf.over_batches(hf.hvp(loss))(chosen, BATCHES), chosen)
    assert relative_error(found, hessian(loss, chosen, (X, Y))) < 1e-9
    mean = hf.supervised(model_fn, per_row("mean"))

    def decayed(params: Any, batch: Any) -> Tensor:
        return mean(params, batch) + sum(leaf.square().sum() for leaf in params.values())

    found = matrix(hf.over_batches(hf.hvp(decayed))(params, BATCHES), params)
    assert relative_error(found, hessian(decayed, params, (X, Y))) < 1e-9


def test_a_weight_of_the_user_is_a_weighted_mean_of_whatever_is_given() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, nn.CrossEntropyLoss(reduction="sum"))
    found = matrix(hf.over_batches(hf.hvp(loss), weight=hf.examples)(params, BATCHES), params)
    expected = sum(len(b[1]) * hessian(loss, params, b) for b in BATCHES) / 7
    assert relative_error(found, expected) < 1e-9


def test_a_sum_needs_no_count_of_examples() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(lambda p, x: model_fn(p, x).mean(0), nn.CrossEntropyLoss(reduction="sum"))
    parts = [(torch.randn(t, n, 3).double(), torch.arange(n) % 2) for t, n in ((5, 2), (3, 4))]
    found = matrix(hf.over_batches(hf.hvp(loss))(params, parts), params)
    assert relative_error(found, sum(hessian(loss, params, part) for part in parts)) < 1e-9


def test_a_mean_and_a_sum_are_not_added_up() -> None:
    _, model_fn, params = net()
    mean, total = (
        hf.hvp(hf.supervised(model_fn, nn.CrossEntropyLoss(reduction=reduction)))
        for reduction in ("mean", "sum")
    )
    both = hf.over_batches(lambda p, b: hf.matvecs.add(mean(p, b), total(p, b)))(params, BATCHES)
    with pytest.raises(ValueError, match="a mean over examples and a sum over examples are added"):
        both(hf.random_like(params, 1, seed=0))


@pytest.mark.parametrize("own", [False, True])
def test_a_landscape_of_a_sum_is_the_sum_over_batches(own: bool) -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, per_row("sum") if own else nn.CrossEntropyLoss(reduction="sum"))
    direction = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    found = hf.landscape(loss, params, BATCHES, direction, at=torch.tensor([0.0, 0.5]).double())
    moved = {name: leaf + 0.5 for name, leaf in params.items()}
    right = torch.stack([loss(params, (X, Y)), loss(moved, (X, Y))]).detach()
    assert relative_error(found.values, right) < 1e-10


# Batches of batches


CLASS_WEIGHTS = torch.tensor([1.0, 5.0], dtype=torch.float64)


IGNORED = torch.where(torch.arange(7) == 0, -100, Y)


NESTED: dict[str, tuple[Any, Tensor]] = {
    "sum": (nn.CrossEntropyLoss(reduction="sum"), Y),
    "mean": (F.cross_entropy, Y),
    "ignored": (F.cross_entropy, IGNORED),
    "weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), Y),
    "own sum": (per_row("sum"), Y),
    "own mean": (per_row("mean"), Y),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["pieces", "lists"])
@pytest.mark.parametrize("name", NESTED)
def test_nested_batches_are_those_of_the_whole(name: str, kind: str, keep: bool) -> None:
    criterion, targets = NESTED[name]
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, criterion)
    batches = [(X[:2], targets[:2]), (X[2:6], targets[2:6]), (X[6:], targets[6:])]
    within = hf.over_batches(hf.hvp(loss), keep=keep)
    if kind == "pieces":
        curvature = hf.over_batches(lambda p, b: within(p, hf.microbatches(b, 2)), keep=keep)
        matvec = curvature(params, batches)
    else:
        matvec = hf.over_batches(within, keep=keep)(params, [batches[:2], batches[2:]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = matrix(matvec, params)
    assert relative_error(found, hessian(loss, params, (X, targets))) < 1e-9


@pytest.mark.parametrize("replace", [False, True])
def test_draws_of_nested_batches_are_those_of_the_whole(replace: bool) -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, nn.CrossEntropyLoss(reduction="sum"))
    within = hf.over_batches(hf.hvp(loss))

    def pieces(params: Any, batch: Any) -> Any:
        return within(params, hf.microbatches(batch, 2))

    some = hf.draws(pieces, seed=0, replace=replace)(params, BATCHES)
    plain = hf.draws(hf.hvp(loss), seed=0, replace=replace)(params, BATCHES)
    for i in range(3):
        assert relative_error(matrix(some(i), params), matrix(plain(i), params)) < 1e-9
    mean = hf.supervised(model_fn, F.cross_entropy)
    lists = hf.draws(hf.over_batches(hf.hvp(mean)), seed=0)(
        params, [BATCHES[1:2] * 2, BATCHES[1:2]]
    )
    some = lists(0), lists(1)
    with pytest.raises(ValueError, match=r"drawn with the weight 4, .* weight 8: pass their"):
        [matvec(hf.random_like(params, 1, seed=0)) for matvec in some]


@pytest.mark.parametrize("keep", [False, True])
def test_a_nested_mean_beside_another_loss_needs_one_weight(keep: bool) -> None:
    _, model_fn, params = net()
    plain, weighted = (
        hf.supervised(model_fn, nn.CrossEntropyLoss(weight=weight))
        for weight in (None, CLASS_WEIGHTS)
    )

    def both(loss: Any) -> Any:
        within = hf.over_batches(hf.hvp(loss))
        return hf.over_batches(
            lambda p, b: hf.matvecs.add(within(p, hf.microbatches(b, 2)), hf.hvp(plain)(p, b)),
            keep=keep,
        )(params, BATCHES)

    right = 2 * hessian(plain, params, (X, Y))
    assert relative_error(matrix(both(plain), params), right) < 1e-9
    with pytest.raises(ValueError, match="no single weight.*pass a weight to the outer one"):
        both(weighted)(hf.random_like(params, 1, seed=0))


def test_an_inner_weight_of_the_user_adds_up() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, per_row("mean"))
    within = hf.over_batches(hf.hvp(loss), weight=lambda batch: 2.0 * len(batch[1]))
    found = matrix(hf.over_batches(within)(params, [BATCHES[:2], BATCHES[2:]]), params)
    assert relative_error(found, hessian(loss, params, (X, Y))) < 1e-9


def test_a_mean_over_examples_gives_no_warning() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, nn.CrossEntropyLoss(label_smoothing=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = matrix(hf.over_batches(hf.hvp(loss))(params, BATCHES), params)
    assert relative_error(found, hessian(loss, params, (X, Y))) < 1e-9


@pytest.mark.parametrize("weight", [lambda batch: None, lambda batch: "many"])
def test_a_weight_that_is_no_number_is_refused(weight: Any) -> None:
    params = {"w": torch.ones(2)}
    curvature = hf.over_batches(hf.hvp(lambda p, b: (p["w"] * b).pow(4).sum()), weight=weight)
    with pytest.raises(TypeError, match="the weight of a batch is .*: return a number"):
        curvature(params, [torch.ones(2)])(hf.random_like(params, 1, seed=0))
