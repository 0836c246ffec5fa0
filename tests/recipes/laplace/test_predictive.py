"""Predictions of a linearised network."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.recipes.laplace import Predictive
from tests.recipes.laplace.problem import INPUTS, MODEL_FN, NOISE, PARAMS, D, posterior

MEAN = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 0.0]], dtype=D)
ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.2, 0.5]], dtype=D)
COVARIANCE = (ROOT @ ROOT.mT).expand(2, 3, 3)


def _predictive(family: str, noise: float | None = None) -> Predictive:
    return Predictive(mean=MEAN, covariance=COVARIANCE, family=family, noise=noise)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 5, 12, None])
def test_chunks_of_examples_change_nothing(size: int | None) -> None:
    found = posterior(F.cross_entropy)
    whole = found.predictive(MODEL_FN, INPUTS, examples_per_chunk=12)
    other = found.predictive(MODEL_FN, INPUTS, examples_per_chunk=size)
    torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-12, atol=1e-14)


def test_the_variance_of_a_new_target_contains_the_noise() -> None:
    predictive = posterior(F.mse_loss).predictive(MODEL_FN, INPUTS)
    torch.testing.assert_close(predictive.variance, predictive.output_variance + NOISE**2)
    with pytest.raises(ValueError, match="take `mean` and `variance`"):
        predictive.probabilities()
    with pytest.raises(ValueError, match="have probabilities"):
        _ = _predictive("categorical").variance


def test_a_single_output_without_an_axis_gets_one() -> None:
    model = nn.Linear(3, 1).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(lambda p, x: model_fn(p, x)[:, 0], F.binary_cross_entropy_with_logits)
    data = [(INPUTS, (INPUTS[:, 0] > 0).double())]
    found = hf.laplace(loss, params, data)
    predictive = found.predictive(loss.outputs, (INPUTS, None))
    assert predictive.mean.shape == (12, 1)
    assert predictive.covariance.shape == (12, 1, 1)


def test_the_probit_approximation_flattens_probabilities() -> None:
    for family, link in (("categorical", lambda x: x.softmax(1)), ("bernoulli", torch.sigmoid)):
        expected = link(MEAN / (1 + math.pi / 8 * COVARIANCE.diagonal(dim1=1, dim2=2)).sqrt())
        torch.testing.assert_close(_predictive(family).probabilities(), expected)


def test_the_probit_approximation_is_near_the_integral_of_a_sigmoid() -> None:
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(60))
    root = COVARIANCE.diagonal(dim1=1, dim2=2).sqrt()
    values = torch.sigmoid(MEAN[..., None] + root[..., None] * nodes)
    exact = (values * weights).sum(-1) / weights.sum()
    predictive = _predictive("bernoulli")
    # The approximation of the sigmoid by a probit deviates by at most about 0.02.
    torch.testing.assert_close(predictive.probabilities(), exact, rtol=0, atol=0.02)
    # The values of a sigmoid have a standard deviation of at most 1 / 2.
    drawn = predictive.probabilities(samples=1000, seed=0)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=5 * 0.5 / 1000**0.5)


def test_samples_have_the_covariance() -> None:
    draws = _predictive("categorical").samples(1000, seed=0)
    white = torch.linalg.solve_triangular(ROOT, (draws - MEAN).mT, upper=False)
    second = torch.einsum("kib,kjb->bij", white, white) / len(draws)
    # The entries of the second moment of k standard normal vectors have variances of at most 2 / k.
    unit = torch.eye(3, dtype=D).expand_as(second)
    torch.testing.assert_close(second, unit, rtol=0, atol=6 * (2 / 1000) ** 0.5)


def test_a_predictive_is_saved_and_shown(tmp_path: Path) -> None:
    found = _predictive("normal", 0.5)
    found.save(tmp_path / "predictive.npz")
    loaded = hf.load(tmp_path / "predictive.npz")
    assert torch.equal(loaded.variance, found.variance)
    assert "examples=2" in repr(loaded)


def test_a_layer_that_mixes_examples_is_refused() -> None:
    def mixing(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return MODEL_FN(params, inputs - inputs.mean(0))

    with pytest.raises(ValueError, match="mixes examples"):
        posterior(F.cross_entropy).predictive(mixing, INPUTS)


def test_outputs_with_more_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="one vector for each example"):
        posterior(F.cross_entropy).predictive(lambda p, x: MODEL_FN(p, x)[:, :, None], INPUTS)


def test_many_networks_are_evaluated_with_samples() -> None:
    found = posterior(F.cross_entropy)
    outputs = torch.func.vmap(MODEL_FN, in_dims=(0, None))(found.samples(3, seed=0), INPUTS)
    first = {name: leaf[0] for name, leaf in found.samples(1, seed=0).items()}
    torch.testing.assert_close(outputs[0], MODEL_FN(first, INPUTS))
    assert list(first) == list(PARAMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_outputs_have_samples_and_probabilities(dtype: torch.dtype) -> None:
    predictive = Predictive(
        mean=MEAN.to(dtype), covariance=COVARIANCE.to(dtype), family="categorical", noise=None
    )
    assert predictive.samples(4, seed=0).dtype == dtype
    found, wide = predictive.probabilities(samples=50), _predictive("categorical")
    assert found.dtype == dtype
    torch.testing.assert_close(found.sum(1).float(), torch.ones(2), rtol=0, atol=0.03)
    torch.testing.assert_close(found.double(), wide.probabilities(samples=4000), rtol=0, atol=0.2)


def test_no_example_is_refused() -> None:
    with pytest.raises(ValueError, match="inputs have no example"):
        posterior(F.cross_entropy).predictive(MODEL_FN, INPUTS[:0])
