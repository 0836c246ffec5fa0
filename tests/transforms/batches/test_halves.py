"""Reductions that the losses of the halves of a batch tell."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.batches.halves import ReductionWarning
from tests.reference import hessian, matrix, relative_error
from tests.transforms.batches.reductions import BATCHES, X, Y, net, per_row


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_is_not_known_is_compared_with_its_halves(reduction: str, plain: bool) -> None:
    _, model_fn, params = net()
    loss: Any = hf.supervised(model_fn, per_row(reduction))
    if plain:
        whole = loss
        loss = lambda params, batch: whole(params, batch)  # noqa: E731
    found = matrix(hf.over_batches(hf.hvp(loss))(params, BATCHES), params)
    assert relative_error(found, hessian(loss, params, (X, Y))) < 1e-9


def test_a_loss_that_is_neither_gives_a_warning() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, lambda out, y: (out[range(len(y)), y]).square().sum().sqrt())
    matvec = hf.over_batches(hf.hvp(loss))(params, BATCHES)
    with pytest.warns(ReductionWarning, match="losses of its halves.*Pass .*`weight="):
        matvec(hf.random_like(params, 1, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighted = hf.over_batches(hf.hvp(loss), weight=hf.examples)(params, BATCHES)
        weighted(hf.random_like(params, 1, seed=0))
        # There is nothing to average over one batch.
        hf.over_batches(hf.hvp(loss))(params, BATCHES[1:2])(hf.random_like(params, 1, seed=0))


def test_a_loss_of_single_examples_that_is_not_known_gives_a_warning() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(model_fn, per_row("sum"))
    single = [(X[i : i + 1], Y[i : i + 1]) for i in range(3)]
    matvec = hf.over_batches(hf.hvp(loss))(params, single)
    with pytest.warns(ReductionWarning, match="no batch has two examples.*Pass .*`weight="):
        matvec(hf.random_like(params, 1, seed=0))
    known = hf.over_batches(hf.hvp(hf.supervised(model_fn, F.cross_entropy)))(params, single)
    known(hf.random_like(params, 1, seed=0))
    hf.over_batches(hf.hvp(loss))(params, [*single, (X, Y)])(hf.random_like(params, 1, seed=0))


def test_a_loss_that_fails_on_half_a_batch_gives_a_warning() -> None:
    _, model_fn, params = net()

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(targets) == 2:
            raise ValueError("batches of two are not for me")
        return per_row("mean")(outputs, targets)

    loss = hf.supervised(model_fn, criterion)
    matvec = hf.over_batches(hf.hvp(loss))(params, BATCHES[:2])
    with pytest.warns(ReductionWarning, match="could not be evaluated .batches of two are not"):
        matvec(hf.random_like(params, 1, seed=0))


def test_the_comparison_draws_nothing_from_the_random_stream() -> None:
    _, model_fn, params = net()
    loss = hf.supervised(lambda p, x: F.dropout(model_fn(p, x), 0.5), per_row("mean"))
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReductionWarning)
        hf.over_batches(hf.hvp(loss))(params, BATCHES)(hf.random_like(params, 1, seed=0))
    assert torch.equal(state, torch.get_rng_state())
