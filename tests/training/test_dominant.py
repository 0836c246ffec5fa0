"""The dominant eigenvalue during a training."""

from __future__ import annotations

import pytest
from torch import nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.training.dominant import watch
from hessfunc.training.loop import train
from hessfunc.training.methods import SGD
from tests.training.blobs import blobs


def test_the_eigenvalue_is_that_of_the_hessian_in_eval_mode() -> None:
    model = mlp([2, 6, 2], nn.Tanh)
    measured = watch(model, blobs().batches(25), max_matvecs=60, rtol=1e-6)
    records = list(
        train(
            model,
            SGD(lr=0.3).steps(model),
            blobs(),
            epochs=3,
            batch_size=20,
            watch=measured,
            track=True,
        )
    )
    assert records[0].eigenvalue is None
    model_fn, params = hf.functional(model)
    matvec = hf.hvp(hf.supervised(model_fn, F.cross_entropy))(
        params, (blobs().inputs, blobs().targets)
    )
    expected = hf.lanczos(matvec, params, k=1, seed=0).values[0]
    assert records[-1].eigenvalue == pytest.approx(float(expected), rel=1e-4)
    # What is only watched costs the training nothing.
    assert (records[-1].matvecs, records[-1].gradients) == (0, 9)


def test_a_warm_start_saves_products() -> None:
    model = mlp([2, 16, 2], nn.Tanh)
    measured = watch(model, blobs().batches(60), max_matvecs=100, rtol=1e-3)
    cold = measured(None)
    SGD(lr=0.01).steps(model)([(blobs().inputs, blobs().targets)])
    warm = measured(cold.vectors)
    assert bool(warm.converged.all())
    assert warm.matvecs < cold.matvecs
