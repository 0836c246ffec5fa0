import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.criteria import closed_form
from hessfunc.transforms.output_gradients import LinearCriterionWarning, NotConvexWarning
from tests.reference import hessian, matrix, relative_error
from tests.transforms.outputs import CLASSES, LOGITS, TARGETS, of_outputs


class Scaled(nn.CrossEntropyLoss):
    """A subclass computes something else."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(3 * outputs, targets)


@dataclasses.dataclass
class Unhashable:
    """A criterion that is no key of a dict."""

    scale: float = 2.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (Scaled(), CLASSES),
        (Unhashable(), CLASSES),
        (lambda out, y: 2 * F.cross_entropy(out, y), CLASSES),
        (functools.partial(lambda out, y, by: by * F.cross_entropy(out, y), by=3.0), CLASSES),
        (nn.HuberLoss(delta=10.0), TARGETS),
        (nn.PoissonNLLLoss(), TARGETS.abs()),
        (lambda out, y: F.nll_loss(out.log_softmax(1), y), CLASSES),
        (lambda out, y: out.logsumexp(1).mean() - (out * y).mean(), TARGETS),
        (lambda out, y: torch.linalg.vector_norm(out - y, dim=1).mean(), TARGETS),
    ],
    ids=[
        *("subclass", "unhashable", "lambda", "partial", "huber", "poisson", "nll", "log-sum-exp"),
        "norm",
    ],
)
def test_any_other_convex_criterion_goes_through_autodiff_without_a_warning(
    criterion: Any, targets: Tensor
) -> None:
    assert closed_form(criterion) is None
    loss, params, batch = of_outputs(criterion), {"z": LOGITS}, (None, targets)
    found = matrix(hf.ggnvp(loss)(params, batch), params)
    assert relative_error(found, hessian(loss, params, batch)) < 1e-10


def test_a_criterion_that_is_linear_in_the_outputs_gives_zero() -> None:
    loss, params = of_outputs(nn.L1Loss()), {"z": LOGITS}
    with pytest.warns(LinearCriterionWarning, match=r"linear in the model's outputs.*hvp\(loss"):
        matvec = hf.ggnvp(loss)(params, (None, TARGETS))
    assert not matrix(matvec, params).any()


@pytest.mark.parametrize(
    "criterion", [F.nll_loss, nn.NLLLoss(), functools.partial(F.nll_loss, reduction="sum")]
)
def test_log_softmax_before_nll_loss_is_recognised(criterion: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, criterion)
    batch = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    curvatures = [
        hf.ggnvp(loss),
        *(of(loss, model) for of in (hf.kronecker.kflr, hf.kronecker.ekfac, hf.kronecker.kfra)),
    ]
    for curvature in curvatures:
        with pytest.warns(LinearCriterionWarning, match=r"nll_loss is linear.*cross_entropy"):
            curvature(params, batch)
    with pytest.warns(LinearCriterionWarning, match=r"nll_loss is linear.*cross_entropy"):
        hf.ggn_diagonal(loss, params, [batch])


def test_a_criterion_that_is_linear_near_some_outputs_only_gives_no_warning() -> None:
    outputs = 10 * LOGITS.sign()
    outputs[0] = 0.01
    loss = of_outputs(lambda out, _: F.huber_loss(out, torch.zeros_like(out)))
    params = {"z": outputs}
    assert matrix(hf.ggnvp(loss)(params, (None, TARGETS)), params).any()


@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: (out - y).square().mul(torch.tensor([1.0, 1.0, -0.1, 1.0])).mean(),
        lambda out, y: torch.tanh((out - y).square()).mean(),
        lambda out, y: (out[:, 0] * out[:, 1]).mean(),
        lambda out, y: 1e-12 * out.cos().sum(),
    ],
    ids=["one entry", "robust", "saddle", "small"],
)
def test_a_criterion_that_is_not_convex_gives_a_warning_and_its_hessian(criterion: Any) -> None:
    loss, params, batch = of_outputs(criterion), {"z": LOGITS}, (None, TARGETS)
    with pytest.warns(NotConvexWarning, match="may have negative eigenvalues") as caught:
        found = matrix(hf.ggnvp(loss)(params, batch), params)
    assert len(caught) == 1
    expected = hessian(loss, params, batch)
    assert relative_error(found, expected) < 1e-10
    assert torch.linalg.eigvalsh(expected)[0] < 0


def test_one_example_that_is_not_convex_among_many_gives_a_warning() -> None:
    sign = torch.ones(12)
    sign[7] = -1
    loss = of_outputs(lambda out, _: (sign[:, None] * out.square()).sum())
    with pytest.warns(NotConvexWarning):
        hf.ggnvp(loss)({"z": LOGITS.repeat(2, 1)}, (None, None))


# with_output_hessian
