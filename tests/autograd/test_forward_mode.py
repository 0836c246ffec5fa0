"""Criteria in forward mode, and matrices that are the same in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import hessfunc as hf
from tests.reference import hessian, matrix, relative_error

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


T, P, S = draw(6, 4), draw(6, 4).sigmoid(), draw(6, 4).sign()
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 1, 0])
Criterion = Callable[..., Tensor]

CRITERIA: dict[str, Criterion] = {
    "mse": lambda o, r: F.mse_loss(o, T, reduction=r),
    "mse, weighted": lambda o, r: F.mse_loss(o, T, weight=P, reduction=r),  # type: ignore[call-arg]
    "mse, broadcast": lambda o, r: F.mse_loss(o, T[:1].expand_as(o), reduction=r),
    "huber": lambda o, r: F.huber_loss(o, T, delta=0.7, reduction=r),
    "huber, weighted": lambda o, r: F.huber_loss(o, T, weight=P, reduction=r),
    "smooth l1": lambda o, r: F.smooth_l1_loss(o, T, beta=0.7, reduction=r),
    "soft margin": lambda o, r: F.soft_margin_loss(o, S, reduction=r),
    "multilabel soft margin": lambda o, r: F.multilabel_soft_margin_loss(o, P.round(), reduction=r),
    "cross-entropy": lambda o, r: F.cross_entropy(o, Y, label_smoothing=0.1, reduction=r),
    "soft targets": lambda o, r: F.cross_entropy(o, P, reduction=r),
    "nll": lambda o, r: F.nll_loss(F.log_softmax(o, 1), Y, reduction=r),
    "bce": lambda o, r: F.binary_cross_entropy(o.sigmoid(), P, reduction=r),
    "bce with logits": lambda o, r: F.binary_cross_entropy_with_logits(o, P, reduction=r),
    "kl": lambda o, r: F.kl_div(
        F.log_softmax(o, 1), P, reduction="batchmean" if r == "mean" else r
    ),
    "poisson": lambda o, r: F.poisson_nll_loss(o, P, reduction=r),
    "gaussian": lambda o, r: F.gaussian_nll_loss(o, T, o.exp(), reduction=r),
    "cosine": lambda o, r: F.cosine_embedding_loss(o, T, S[:, 0], reduction=r),
    "triplet": lambda o, r: F.triplet_margin_loss(o, T, P, reduction=r),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CRITERIA)
def test_forward_mode_takes_usual_criteria(name: str, reduction: str) -> None:
    def loss(params: Any, _: Any) -> Tensor:
        return CRITERIA[name](torch.tanh(X @ params["w"]), reduction)

    params = {"w": draw(3, 4)}
    expected = hessian(loss, params, None)
    assert expected.norm() > 0
    found = matrix(hf.hvp(loss, mode="forward")(params, None), params)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("module", [nn.MSELoss, nn.HuberLoss, nn.SoftMarginLoss])
def test_modules_of_criteria_are_taken_too(module: Any) -> None:
    params = {"w": draw(3, 4)}
    loss = hf.composed(lambda p, x: torch.tanh(x @ p["w"]), lambda out, _: module()(out, S))
    found = matrix(hf.hvp(loss, mode="forward")(params, X), params)
    assert relative_error(found, hessian(loss, params, X)) < 1e-12


TOKENS = torch.tensor([[0, 1], [3, 0], [2, 4]])


@pytest.mark.parametrize(("mode", "tolerance"), [("forward", 1e-10), ("difference", 1e-6)])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(5, 3, padding_idx=0),
        nn.Embedding(5, 3, padding_idx=-1, max_norm=0.7),
        nn.Embedding(5, 3, scale_grad_by_freq=True, sparse=True),
    ],
)
def test_embeddings_are_the_same_in_every_mode(
    layer: nn.Module, mode: Any, tolerance: float
) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = TOKENS, torch.tensor([0, 1, 1])
    expected = matrix(hf.hvp(loss, mode="reverse")(params, batch), params)
    found = matrix(hf.hvp(loss, mode=mode)(params, batch), params)
    assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize(("mode", "tolerance"), [("forward", 1e-10), ("difference", 1e-6)])
def test_spectral_norm_in_train_mode(mode: Any, tolerance: float) -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 4)).double()
    model_fn, params = hf.functional(model.train())
    loss = hf.supervised(model_fn, F.cross_entropy)
    expected = matrix(hf.hvp(loss, mode="reverse")(params, (X, Y)), params)
    found = matrix(hf.hvp(loss, mode=mode)(params, (X, Y)), params)
    assert relative_error(found, expected) < tolerance


def test_forward_mode_stays_on_afterwards() -> None:
    params = {"w": draw(3, 4)}
    loss = lambda p, _: (X @ p["w"]).tanh().sum()  # noqa: E731
    with torch.no_grad():
        hf.hvp(loss, mode="forward")(params, None)(hf.random_like(params, 1, seed=0))
    _, tangent = torch.func.jvp(torch.sin, (T,), (P,))
    torch.testing.assert_close(tangent, T.cos() * P)
