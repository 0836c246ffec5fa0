"""Marginal likelihood, samples and tuning of a posterior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.recipes.laplace import Posterior
from tests.recipes.laplace.problem import (
    CRITERIA,
    INPUTS,
    MODEL,
    MODEL_FN,
    PARAMS,
    PER_LEAF,
    D,
    posterior,
)

STRUCTURES: dict[str, dict[str, Any]] = {
    "full": {},
    "kronecker": {"model": MODEL},
    "diagonal": {},
    "low_rank": {"rank": 5, "seed": 0},
}


def _ridge(prior: float, noise: float) -> tuple[Any, Tensor]:
    """Return the Laplace posterior of a linear regression at its minimum, and the evidence."""
    design = torch.randn(20, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[1.0, -2.0, 0.5]], dtype=D)
    targets = design @ weights.mT + 0.3 * torch.linspace(-1, 1, 20, dtype=D)[:, None]
    model_fn, _ = hf.functional(nn.Linear(3, 1, bias=False).double())
    precision = design.mT @ design / noise**2 + prior * torch.eye(3, dtype=D)
    minimum = torch.linalg.solve(precision, design.mT @ targets / noise**2)
    found = hf.laplace(
        hf.supervised(model_fn, F.mse_loss),
        {"weight": minimum.mT.contiguous()},
        [(design, targets)],
        prior_precision=prior,
        noise=noise,
    )
    covariance = noise**2 * torch.eye(20, dtype=D) + design @ design.mT / prior
    normal = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=D), covariance)
    return found, normal.log_prob(targets[:, 0])


@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("prior", [0.1, 4.0])
def test_the_evidence_of_a_linear_regression_is_exact(prior: float, noise: float) -> None:
    found, evidence = _ridge(prior, noise)
    torch.testing.assert_close(found.log_marginal_likelihood(), evidence, rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_evidence_is_differentiable_in_prior_and_noise(structure: str) -> None:
    found = posterior(F.mse_loss, structure=structure, **STRUCTURES[structure])

    def of_leaves(noise: Tensor, *each: Tensor) -> Tensor:
        return found.log_marginal_likelihood(dict(zip(PARAMS, each, strict=True)), noise)

    numbers = [torch.tensor(x, dtype=D, requires_grad=True) for x in (0.7, *PER_LEAF.values())]
    assert torch.autograd.gradcheck(of_leaves, numbers)
    assert torch.autograd.gradcheck(found.log_marginal_likelihood, (numbers[1], numbers[0]))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("per_parameter", [False, True])
def test_tuning_ends_at_a_maximum_of_the_evidence(criterion: Any, per_parameter: bool) -> None:
    start = posterior(criterion, prior_precision=2.0)
    best = start.tuned(per_parameter=per_parameter)
    assert best.tuning.startswith("converged")
    assert best.reason == start.reason
    value = float(best.log_marginal_likelihood())
    assert value > float(start.log_marginal_likelihood())
    assert isinstance(best.prior_precision, dict) is per_parameter
    precisions = best.prior_precision if per_parameter else {"": best.prior_precision}
    for name in precisions:
        for factor in (0.9, 1.1):
            moved = {**precisions, name: factor * precisions[name]}
            other = float(best.log_marginal_likelihood(moved if per_parameter else moved[""]))
            assert other < value
    if best.noise is not None:
        assert float(best.log_marginal_likelihood(noise=1.1 * best.noise)) < value
        assert start.tuned(tune_noise=False).noise == start.noise


def test_tuning_satisfies_the_fixed_point_of_mackay() -> None:
    best = posterior(F.cross_entropy, prior_precision=1.0).tuned()
    # d |params|^2 = gamma, the number of well-determined parameters: n - d tr P^-1.
    trace = float(hf.matrix(best.covariance, PARAMS).trace())
    gamma = len(hf.ravel(PARAMS)) - best.prior_precision * trace
    size = best.prior_precision * float(hf.inner(PARAMS, PARAMS))
    assert gamma == pytest.approx(size, rel=1e-5)


def test_a_network_that_fits_exactly_has_no_best_noise() -> None:
    model_fn, params = hf.functional(nn.Linear(3, 1, bias=False).double())
    data = [(INPUTS, model_fn(params, INPUTS).detach())]
    found = hf.laplace(hf.supervised(model_fn, F.mse_loss), params, data)
    assert found.tuned(tune_noise=False).tuning.startswith("converged")
    with pytest.raises(FloatingPointError, match="tune_noise=False"):
        found.tuned()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_have_the_mean_and_the_covariance(structure: str) -> None:
    found = posterior(F.mse_loss, structure=structure, **STRUCTURES[structure])
    count = 1000
    draws = torch.cat([leaf.flatten(1) for leaf in found.samples(count, seed=0).values()], dim=1)
    covariance = hf.matrix(found.covariance, PARAMS)
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, (draws - hf.ravel(PARAMS)).mT, upper=False)
    # The entries of the second moment of k standard normal vectors have variances of at most 2 / k.
    second = white @ white.mT / count
    assert float((second - torch.eye(len(second), dtype=D)).abs().max()) < 6 * (2 / count) ** 0.5
    assert float(white.mean(1).abs().max()) < 6 / count**0.5


def test_a_sample_depends_on_its_index_only() -> None:
    found = posterior(F.cross_entropy)
    few, many = found.samples(2, seed=3), found.samples(5, seed=3)
    torch.testing.assert_close(few, {name: leaf[:2] for name, leaf in many.items()})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_saved_posterior_predicts_the_same(structure: str, tmp_path: Path) -> None:
    found = posterior(F.mse_loss, structure=structure, **STRUCTURES[structure])
    found.save(tmp_path / "posterior.npz")
    loaded = hf.load(tmp_path / "posterior.npz")
    assert isinstance(loaded, Posterior)
    assert repr(loaded) == repr(found)
    own, other = (p.predictive(MODEL_FN, INPUTS) for p in (found, loaded))
    assert torch.equal(own.covariance, other.covariance)


def test_noise_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="categorical targets have no noise"):
        posterior(F.cross_entropy).log_marginal_likelihood(noise=1.0)


def test_the_repr_says_which_structure_gave_the_evidence() -> None:
    found = posterior(F.cross_entropy, structure="diagonal")
    assert "structure=diagonal" in repr(found)
    assert "diagonal" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["prior_precision"] == PER_LEAF
    assert "params" not in found.to_dict(vectors=False)


def test_predictions_without_the_model_are_explained() -> None:
    found = posterior(F.mse_loss)
    with pytest.raises(TypeError, match=r"pass the model first, `posterior\.predictive\(model_fn"):
        found.predictive(INPUTS)  # type: ignore[arg-type]
