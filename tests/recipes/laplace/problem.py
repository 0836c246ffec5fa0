"""Small networks with normal, categorical and Bernoulli targets, and their exact posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import hessfunc as hf

D = torch.float64
NOISE = 0.7

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
MODEL_FN, PARAMS = hf.functional(MODEL)
INPUTS = torch.randn(12, 3, dtype=D)
TARGETS = {
    F.mse_loss: torch.randn(12, 2, dtype=D),
    F.cross_entropy: torch.arange(12) % 2,
    F.binary_cross_entropy_with_logits: (torch.randn(12, 2, dtype=D) > 0).double(),
}
CRITERIA = list(TARGETS)
N = sum(leaf.numel() for leaf in PARAMS.values())
PER_LEAF = dict(zip(PARAMS, (0.5, 1.0, 2.0, 4.0), strict=True))


def loss_of(criterion: Any) -> hf.Loss:
    return hf.supervised(MODEL_FN, criterion)


def batches(criterion: Any) -> list[Any]:
    """Return the data in two batches of different sizes."""
    targets = TARGETS[criterion]
    return [(INPUTS[:5], targets[:5]), (INPUTS[5:], targets[5:])]


def noise_of(criterion: Any) -> dict[str, float]:
    return {"noise": NOISE} if criterion is F.mse_loss else {}


def posterior(criterion: Any, **given: Any) -> Any:
    given = {"prior_precision": PER_LEAF} | noise_of(criterion) | given
    return hf.laplace(loss_of(criterion), PARAMS, batches(criterion), **given)


def flat_prior(precision: dict[str, float]) -> Tensor:
    return torch.cat([torch.full((PARAMS[n].numel(),), precision[n], dtype=D) for n in PARAMS])


def jacobian(inputs: Tensor) -> Tensor:
    """Return the Jacobian of the outputs, ``(B, C, n)``, by `torch.func`."""
    trees = jacrev(lambda p: functional_call(MODEL, p, (inputs,)))(PARAMS)
    return torch.cat([leaf.flatten(2) for leaf in trees.values()], dim=2)


def curvature(criterion: Any) -> Tensor:
    """Return the Gauss-Newton matrix of the negative log-likelihood, by its definition."""
    outputs = functional_call(MODEL, PARAMS, (INPUTS,)).detach()
    p = outputs.softmax(1)
    blocks = {
        F.mse_loss: torch.eye(2, dtype=D).expand(12, 2, 2) / NOISE**2,
        F.cross_entropy: torch.diag_embed(p) - p[:, :, None] * p[:, None],
        F.binary_cross_entropy_with_logits: torch.diag_embed(
            outputs.sigmoid() * (1 - outputs.sigmoid())
        ),
    }[criterion]
    rows = jacobian(INPUTS)
    return torch.einsum("bin,bij,bjm->nm", rows, blocks, rows)


def log_likelihood(criterion: Any) -> Tensor:
    """Return the log-likelihood of all targets, by `torch.distributions`."""
    outputs, targets = functional_call(MODEL, PARAMS, (INPUTS,)).detach(), TARGETS[criterion]
    distribution: Any = {
        F.mse_loss: lambda: torch.distributions.Normal(outputs, NOISE),
        F.cross_entropy: lambda: torch.distributions.Categorical(logits=outputs),
        F.binary_cross_entropy_with_logits: lambda: torch.distributions.Bernoulli(logits=outputs),
    }[criterion]()
    return distribution.log_prob(targets).sum()
