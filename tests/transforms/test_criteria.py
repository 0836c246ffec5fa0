import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.criteria import closed_form, declared_reduction
from tests.graphs import allocated
from tests.reference import hessian, matrix, relative_error
from tests.transforms.outputs import CLASSES, LOGITS, TARGETS, of_outputs

WEIGHT = torch.tensor([0.5, 2.0, 0.1, 1.3]).double()


SHARES = torch.softmax(torch.linspace(0, 7, 24).double().cos().mul(3).view(6, 4), 1)


LABELS = (torch.arange(24) % 3 == 0).double().view(6, 4)


# [N, C, d]: two examples of four classes at three positions.
POSITIONS = LOGITS.view(2, 3, 4).movedim(-1, 1)


cross_entropy = functools.partial(functools.partial, F.cross_entropy)


bce = functools.partial(functools.partial, F.binary_cross_entropy_with_logits)


CRITERIA: dict[str, tuple[Any, Tensor, Tensor]] = {
    "cross-entropy": (F.cross_entropy, LOGITS, CLASSES),
    "partial": (cross_entropy(reduction="sum"), LOGITS, CLASSES),
    "module": (nn.CrossEntropyLoss(), LOGITS, CLASSES),
    "module, sum": (nn.CrossEntropyLoss(reduction="sum"), LOGITS, CLASSES),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), LOGITS, CLASSES),
    "class weights, sum": (cross_entropy(weight=WEIGHT, reduction="sum"), LOGITS, CLASSES),
    "smoothing": (cross_entropy(label_smoothing=0.3), LOGITS, CLASSES),
    "smoothing, weights": (
        nn.CrossEntropyLoss(label_smoothing=0.3, weight=WEIGHT),
        LOGITS,
        CLASSES,
    ),
    "ignored": (cross_entropy(ignore_index=1), LOGITS, CLASSES),
    "ignored by default": (F.cross_entropy, LOGITS, CLASSES.where(CLASSES != 1, -100)),
    "ignored, weights": (cross_entropy(ignore_index=1, weight=WEIGHT), LOGITS, CLASSES),
    "ignored, smoothing, weights, sum": (
        nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.3, weight=WEIGHT, reduction="sum"),
        LOGITS,
        CLASSES,
    ),
    "ignored, smoothing, weights": (
        nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.3, weight=WEIGHT),
        LOGITS,
        CLASSES,
    ),
    "probabilities": (F.cross_entropy, LOGITS, SHARES),
    "probabilities that do not sum to 1": (F.cross_entropy, LOGITS, SHARES * WEIGHT),
    "probabilities, weights": (cross_entropy(weight=WEIGHT), LOGITS, SHARES),
    "probabilities, smoothing, weights, sum": (
        cross_entropy(weight=WEIGHT, label_smoothing=0.3, reduction="sum"),
        LOGITS,
        SHARES,
    ),
    "positions": (F.cross_entropy, POSITIONS, CLASSES.view(2, 3)),
    "positions, ignored, weights": (
        cross_entropy(ignore_index=1, weight=WEIGHT),
        POSITIONS,
        CLASSES.view(2, 3),
    ),
    "positions, probabilities, weights, smoothing": (
        cross_entropy(weight=WEIGHT, label_smoothing=0.2),
        POSITIONS,
        SHARES.view(2, 3, 4).movedim(-1, 1),
    ),
    "one prediction": (F.cross_entropy, LOGITS[0], CLASSES[0]),
    "one prediction, probabilities": (F.cross_entropy, LOGITS[0], SHARES[0]),
    "mse": (F.mse_loss, LOGITS, TARGETS),
    "mse, module, sum": (nn.MSELoss(reduction="sum"), LOGITS, TARGETS),
    "mse, partial": (functools.partial(F.mse_loss, reduction="mean"), POSITIONS, POSITIONS + 1),
    "bce": (F.binary_cross_entropy_with_logits, LOGITS, LABELS),
    "bce, module, sum": (nn.BCEWithLogitsLoss(reduction="sum"), LOGITS, LABELS),
    "bce, soft labels": (nn.BCEWithLogitsLoss(), LOGITS, SHARES),
    "bce, weight": (nn.BCEWithLogitsLoss(weight=WEIGHT), LOGITS, LABELS),
    "bce, pos_weight": (bce(pos_weight=WEIGHT), LOGITS, LABELS),
    "bce, both, sum": (
        bce(weight=SHARES, pos_weight=WEIGHT, reduction="sum"),
        LOGITS,
        SHARES,
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_closed_forms_equal_the_hessian_of_the_criterion(name: str) -> None:
    criterion, outputs, targets = CRITERIA[name]
    assert closed_form(criterion) is not None
    loss, params, batch = of_outputs(criterion), {"z": outputs}, (None, targets)
    found = matrix(hf.ggnvp(loss)(params, batch), params)
    assert relative_error(found, hessian(loss, params, batch)) < 1e-10


@pytest.mark.parametrize("name", ["class weights", "positions", "mse", "bce, pos_weight"])
def test_closed_forms_are_those_of_composed_losses_too(name: str) -> None:
    criterion, outputs, targets = CRITERIA[name]
    composed = hf.composed(lambda p, _: p["z"], lambda out, batch: criterion(out, batch["targets"]))
    direct = hf.composed(lambda p, _: p["z"], criterion)
    params = {"z": outputs}
    expected = hessian(direct, params, targets)
    assert relative_error(matrix(hf.ggnvp(direct)(params, targets), params), expected) < 1e-10
    found = matrix(hf.ggnvp(composed)(params, {"targets": targets}), params)
    assert relative_error(found, expected) < 1e-10


def test_targets_that_broadcast_count_once_for_each_pair() -> None:
    loss, params = of_outputs(F.mse_loss), {"z": LOGITS[:, :1]}
    batch = None, TARGETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        found = matrix(hf.ggnvp(loss)(params, batch), params)
        expected = hessian(loss, params, batch)
    assert relative_error(found, expected) < 1e-10


def test_a_closed_form_takes_no_derivative_of_the_criterion() -> None:
    loss = hf.supervised(lambda p, x: x * p["w"], CRITERIA["cross-entropy"][0])
    params = {"w": torch.ones(3).double()}
    batch = torch.randn(2, 3).double(), torch.tensor([0, 2])
    with torch.autograd.profiler.profile() as profile:
        hf.ggnvp(loss)(params, batch)(hf.random_like(params, 1, seed=0))
    names = {event.name for event in profile.function_events}
    assert not any("log_softmax_backward" in name or "NllLoss" in name for name in names)


def test_a_product_with_many_classes_takes_three_tensors_of_the_size_of_the_logits() -> None:
    tokens, classes = 64, 5000
    logits, targets = torch.randn(tokens, classes), torch.randint(classes, (tokens,))
    product = closed_form(F.cross_entropy)(logits, targets)  # type: ignore[misc]
    tangent = torch.randn(tokens, classes)
    size = logits.numel() * logits.element_size()
    # The softmax is kept; a product holds its result, and one more.
    assert allocated(lambda: product(tangent)).peak < 2.1 * size
    assert allocated(lambda: closed_form(F.cross_entropy)(logits, targets)).kept < 1.1 * size  # type: ignore[misc]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_old_and_unreduced_forms_have_no_closed_form(reduction: str) -> None:
    options = {"reduction": "none"} if reduction == "none" else {"size_average": True}
    assert closed_form(functools.partial(F.cross_entropy, **options)) is None
    assert closed_form(functools.partial(F.cross_entropy, LOGITS)) is None


def logcosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """A criterion without a closed form of its own."""
    return (outputs - targets).cosh().log().sum()


def test_a_criterion_with_its_own_output_hessian_uses_it() -> None:
    calls: list[Tensor] = []

    def output_hessian(outputs: Tensor, targets: Tensor) -> Any:
        assert not outputs.requires_grad
        calls.append(outputs)
        curvature = 1 - torch.tanh(outputs - targets).square()
        return lambda u: curvature * u

    criterion = hf.with_output_hessian(logcosh, output_hessian)
    assert torch.equal(criterion(LOGITS, TARGETS), logcosh(LOGITS, TARGETS))
    loss, params, batch = of_outputs(criterion), {"z": LOGITS}, (None, TARGETS)
    matvec = hf.ggnvp(loss)(params, batch)
    expected = hessian(loss, params, batch)
    for _ in range(2):
        assert relative_error(matrix(matvec, params), expected) < 1e-10
    assert len(calls) == 1
    assert relative_error(matrix(hf.hvp(loss)(params, batch), params), expected) < 1e-10


def test_the_output_hessian_of_a_composed_loss_gets_the_batch() -> None:
    criterion = hf.with_output_hessian(
        lambda out, batch: batch["scale"] * out.square().sum(),
        lambda out, batch: lambda u: 2 * batch["scale"] * u,
    )
    loss = hf.composed(lambda p, _: p["z"], criterion)
    params = {"z": LOGITS}
    found = matrix(hf.ggnvp(loss)(params, {"scale": 3.0}), params)
    assert relative_error(found, 6 * torch.eye(24).double()) < 1e-12


def test_an_own_output_hessian_may_replace_the_exact_one() -> None:
    # The majorant of the logistic loss, 1/4, say.
    quarter = hf.with_output_hessian(
        functools.partial(F.binary_cross_entropy_with_logits, reduction="sum"),
        lambda out, _: lambda u: u / 4,
    )
    params = {"z": LOGITS}
    found = matrix(hf.ggnvp(of_outputs(quarter))(params, (None, LABELS)), params)
    assert relative_error(found, torch.eye(24).double() / 4) < 1e-12


class Custom(nn.MSELoss):
    """A subclass, which may compute anything."""


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (F.cross_entropy, "mean"),
        (F.huber_loss, "mean"),
        (functools.partial(F.l1_loss, reduction="sum"), "sum"),
        (
            functools.partial(functools.partial(F.l1_loss, reduction="sum"), reduction="mean"),
            "mean",
        ),
        (functools.partial(F.mse_loss, size_average=False), "sum"),
        (functools.partial(F.kl_div, reduction="batchmean"), "mean"),
        (functools.partial(F.mse_loss, reduction="none"), None),
        (nn.PoissonNLLLoss(), "mean"),
        (nn.KLDivLoss(reduction="batchmean"), "mean"),
        (nn.SmoothL1Loss(reduction="sum"), "sum"),
        (Custom(reduction="sum"), None),
        (F.softmax, None),
        (lambda out, y: (out - y).sum(), None),
    ],
)
def test_reductions_of_torch_are_known(criterion: Any, expected: str | None) -> None:
    assert declared_reduction(criterion) == expected
    composed = hf.composed(lambda p, b: p, criterion, targets=lambda b: b)
    assert declared_reduction(composed.criterion) == expected
