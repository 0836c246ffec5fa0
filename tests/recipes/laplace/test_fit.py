"""Laplace approximations in each structure, against the exact normal posterior."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.recipes.laplace.problem import (
    CRITERIA,
    INPUTS,
    MODEL,
    MODEL_FN,
    NOISE,
    PARAMS,
    PER_LEAF,
    TARGETS,
    D,
    N,
    batches,
    curvature,
    flat_prior,
    jacobian,
    log_likelihood,
    loss_of,
    posterior,
)


def dense(found: Any) -> torch.Tensor:
    """Materialise the covariance of a posterior."""
    return hf.matrix(found.covariance, found.params)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("prior", [1.5, PER_LEAF], ids=["one", "per leaf"])
def test_the_full_structure_is_the_exact_normal_posterior(criterion: Any, prior: Any) -> None:
    found = posterior(criterion, prior_precision=prior)
    diagonal = flat_prior(prior if isinstance(prior, dict) else dict.fromkeys(PARAMS, prior))
    precision = curvature(criterion) + diagonal.diag()
    mean = hf.ravel(PARAMS)
    assert torch.equal(hf.ravel(found.params), mean)
    torch.testing.assert_close(dense(found), precision.inverse(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.logdet(), precision.logdet(), rtol=1e-10, atol=0)
    predictive = found.predictive(MODEL_FN, INPUTS)
    rows = jacobian(INPUTS)
    torch.testing.assert_close(predictive.mean, MODEL_FN(PARAMS, INPUTS).detach())
    expected = torch.einsum("bin,nm,bjm->bij", rows, precision.inverse(), rows)
    torch.testing.assert_close(predictive.covariance, expected, rtol=1e-8, atol=1e-10)
    evidence = (
        log_likelihood(criterion)
        + (diagonal.log().sum() - precision.logdet() - (diagonal * mean.square()).sum()) / 2
    )
    torch.testing.assert_close(found.log_marginal_likelihood(), evidence, rtol=1e-10, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1, 4, 7)])
def test_the_posterior_depends_neither_on_the_batches_nor_on_the_reduction(
    reduction: str, sizes: tuple[int, ...]
) -> None:
    loss = loss_of(nn.CrossEntropyLoss(reduction=reduction))
    targets = TARGETS[F.cross_entropy]
    data = list(zip(INPUTS.split(sizes), targets.split(sizes), strict=True))
    precision = curvature(F.cross_entropy) + torch.eye(N, dtype=D)
    found = hf.laplace(loss, PARAMS, data)
    torch.testing.assert_close(dense(found), precision.inverse(), rtol=1e-8, atol=1e-10)
    expected = log_likelihood(F.cross_entropy)
    torch.testing.assert_close(found.likelihood.total, -float(expected), rtol=1e-10, atol=0)


def test_the_diagonal_structure_inverts_the_diagonal() -> None:
    found = posterior(F.cross_entropy, structure="diagonal")
    diagonal = curvature(F.cross_entropy).diagonal() + flat_prior(PER_LEAF)
    torch.testing.assert_close(dense(found), (1 / diagonal).diag(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.logdet(), diagonal.log().sum(), rtol=1e-10, atol=0)


def test_the_kronecker_structure_inverts_the_blocks_of_kflr() -> None:
    criterion = F.cross_entropy
    found = posterior(criterion, structure="kronecker", model=MODEL)
    blocks = hf.over_batches(hf.kronecker.kflr(loss_of(criterion), MODEL))(
        PARAMS, batches(criterion)
    )
    precision = 12 * torch.block_diag(*(blocks[name].dense() for name in PARAMS))
    precision += flat_prior(PER_LEAF).diag()
    torch.testing.assert_close(dense(found), precision.inverse(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.logdet(), precision.logdet(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure", ["kronecker", "ekfac"])
def test_structured_posteriors_of_deep_linear_nets_have_exact_blocks(structure: Any) -> None:
    """Kronecker blocks of deep linear nets with squared errors are those of the GGN matrix."""
    layers = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    model = nn.Sequential(*layers).double()
    model_fn, params = hf.functional(model)
    loss, data = hf.supervised(model_fn, F.mse_loss), batches(F.mse_loss)
    prior = dict(zip(params, (0.5, 1.0, 2.0), strict=True))
    given = {"prior_precision": prior, "noise": NOISE}
    found = hf.laplace(loss, params, data, structure=structure, model=model, **given)
    trees = torch.func.jacrev(lambda p: model_fn(p, INPUTS))(params)
    rows = torch.cat([leaf.flatten(2) for leaf in trees.values()], 2)
    own = torch.block_diag(*(torch.ones(2 * (leaf.numel(),)) for leaf in params.values()))
    diagonal = torch.cat([torch.full_like(p.flatten(), prior[n]) for n, p in params.items()])
    whole = torch.einsum("bin,bim->nm", rows, rows) / NOISE**2
    precision = whole * own + diagonal.diag()
    covariance = precision.inverse()
    torch.testing.assert_close(dense(found), covariance, rtol=1e-8, atol=1e-10)
    predictive = found.predictive(model_fn, INPUTS)
    expected = torch.einsum("bin,nm,bjm->bij", rows, covariance, rows)
    torch.testing.assert_close(predictive.covariance, expected, rtol=1e-8, atol=1e-10)
    errors = model_fn(params, INPUTS).detach() - TARGETS[F.mse_loss]
    normal = torch.distributions.Normal(0, torch.tensor(NOISE, dtype=D))
    mean = hf.ravel(params)
    ratio = precision.logdet() - diagonal.log().sum() + (diagonal * mean.square()).sum()
    evidence = normal.log_prob(errors).sum() - ratio / 2
    torch.testing.assert_close(found.log_marginal_likelihood(), evidence, rtol=1e-10, atol=0)


def test_kronecker_is_full_for_a_linear_map_of_one_example() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    model_fn, params = hf.functional(model)
    loss, data = hf.supervised(model_fn, F.cross_entropy), [(INPUTS[:1], torch.tensor([1]))]
    kronecker = hf.laplace(loss, params, data, structure="kronecker", model=model)
    full = hf.laplace(loss, params, data)
    torch.testing.assert_close(dense(kronecker), dense(full), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        kronecker.log_marginal_likelihood(), full.log_marginal_likelihood(), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_low_rank_with_all_eigenpairs_is_full(criterion: Any) -> None:
    low, full = posterior(criterion, structure="low_rank", rank=N, seed=0), posterior(criterion)
    torch.testing.assert_close(dense(low), dense(full), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(low.logdet(), full.logdet(), rtol=1e-8, atol=0)


def test_low_rank_keeps_the_prior_beside_the_eigenpairs() -> None:
    values, vectors = torch.linalg.eigh(curvature(F.mse_loss))
    kept = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].mT
    found = posterior(F.mse_loss, structure="low_rank", rank=3, seed=0)
    precision = kept + flat_prior(PER_LEAF).diag()
    # Lanczos stops at residuals of 1e-4 of the eigenvalues.
    torch.testing.assert_close(dense(found), precision.inverse(), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.logdet(), precision.logdet(), rtol=1e-4, atol=0)


def test_the_temperature_divides_the_likelihood() -> None:
    cold = posterior(F.cross_entropy, temperature=0.5)
    precision = 2 * curvature(F.cross_entropy) + flat_prior(PER_LEAF).diag()
    torch.testing.assert_close(dense(cold), precision.inverse(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_a_held_loss_gives_the_posterior_of_the_last_layer(structure: str) -> None:
    criterion = F.cross_entropy
    last, rest = hf.split(PARAMS, "2.*")
    held = hf.hold(loss_of(criterion), rest)
    given = {"model": MODEL} if structure == "kronecker" else {}
    found = hf.laplace(held, last, batches(criterion), structure=structure, **given)
    assert list(found.params) == ["2.weight", "2.bias"]
    start = N - sum(leaf.numel() for leaf in last.values())
    if structure == "full":
        precision = curvature(criterion)[start:, start:] + torch.eye(N - start, dtype=D)
        torch.testing.assert_close(dense(found), precision.inverse(), rtol=1e-8, atol=1e-10)
    variance = found.predictive(held.outputs, (INPUTS, None)).covariance
    rows = jacobian(INPUTS)[:, :, start:]
    expected = torch.einsum("bin,nm,bjm->bij", rows, dense(found), rows)
    torch.testing.assert_close(variance, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("criterion", "given", "message"),
    [
        (F.l1_loss, {}, "negative logarithm of a likelihood"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), {}, "negative logarithm of a likelihood"),
        (F.cross_entropy, {"prior_precision": 0.0}, "prior_precision=0: it must be positive"),
        (F.cross_entropy, {"prior_precision": {"a": 1.0}}, "one precision for each parameter"),
        (F.cross_entropy, {"temperature": -1.0}, "temperature=-1: it must be positive"),
        (F.cross_entropy, {"noise": 1.0}, "categorical targets have no noise"),
        (F.mse_loss, {"noise": -1.0}, "noise=-1: it must be positive"),
        (F.cross_entropy, {"structure": "dense"}, "choose 'full', 'kronecker'"),
        (F.cross_entropy, {"structure": "kronecker"}, "pass model=model"),
        (F.cross_entropy, {"structure": "ekfac"}, "'ekfac' needs the module: pass model=model"),
        (F.cross_entropy, {"structure": "low_rank"}, "pass a rank"),
        (F.cross_entropy, {"rank": 3}, "pass a rank exactly for 'low_rank'"),
    ],
)
def test_wrong_options_are_refused(criterion: Any, given: dict[str, Any], message: str) -> None:
    data = batches(F.mse_loss if criterion in (F.mse_loss, F.l1_loss) else F.cross_entropy)
    with pytest.raises(ValueError, match=message):
        hf.laplace(loss_of(criterion), PARAMS, data, **given)


def test_a_loss_without_a_criterion_is_refused() -> None:
    with pytest.raises(TypeError, match="supervised"):
        hf.laplace(lambda p, b: p["w"].sum(), {"w": torch.ones(2)}, [0])  # type: ignore[arg-type]


def test_the_default_noise_is_one() -> None:
    assert hf.laplace(loss_of(F.mse_loss), PARAMS, batches(F.mse_loss)).noise == 1.0
    assert posterior(F.mse_loss).noise == NOISE
    assert posterior(F.cross_entropy).noise is None


@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal", "low_rank"])
def test_single_precision_gives_the_posterior_up_to_rounding(structure: str) -> None:
    model = copy.deepcopy(MODEL).float()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    data = [(INPUTS.float(), TARGETS[F.cross_entropy])]
    given = {"kronecker": {"model": model}, "low_rank": {"rank": 5, "seed": 0}}.get(structure, {})
    found = hf.laplace(loss, params, data, structure=structure, **given)
    if structure == "kronecker":
        given = {"model": MODEL}
    exact = posterior(F.cross_entropy, prior_precision=1.0, structure=structure, **given)
    one, other = found.predictive(model_fn, INPUTS.float()), exact.predictive(MODEL_FN, INPUTS)
    assert one.covariance.dtype == torch.float32
    torch.testing.assert_close(one.covariance.double(), other.covariance, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.logdet(), exact.logdet(), rtol=1e-3, atol=0)
    assert found.samples(2, seed=0)["0.weight"].dtype == torch.float32


def test_a_weight_without_factors_is_refused_with_options_of_laplace() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            weight = self.embedding.weight
            return F.linear(self.embedding(tokens), weight.exp())

    model = Scaled().double()
    model_fn, params = hf.functional(model)
    data = [(torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2]))]
    with pytest.raises(NotImplementedError, match="structure='full'") as refusal:
        hf.laplace(
            hf.supervised(model_fn, F.cross_entropy),
            params,
            data,
            structure="kronecker",
            model=model,
        )
    assert "unsupported" not in str(refusal.value)


@pytest.mark.parametrize("structure", ["full", "kronecker", "ekfac", "diagonal", "low_rank"])
def test_dropout_in_train_mode_is_refused(structure: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    model_fn, params = hf.functional(model)
    more: dict[str, Any] = {"low_rank": {"rank": 3}}
    more |= {name: {"model": model} for name in ("kronecker", "ekfac")}
    loss, data = hf.supervised(model_fn, F.cross_entropy), batches(F.cross_entropy)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        hf.laplace(loss, params, data, structure=structure, **more.get(structure, {}))
    model.eval()
    loss = hf.supervised(hf.functional(model)[0], F.cross_entropy)
    hf.laplace(loss, params, data, structure=structure, **more.get(structure, {}))
