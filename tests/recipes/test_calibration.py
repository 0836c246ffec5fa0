"""Calibration of predicted probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hessfunc as hf

D = torch.float64
LOGITS = torch.randn(200, 4, dtype=D, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(200) % 4


def test_nll_and_accuracy_are_means_with_their_standard_errors() -> None:
    found = hf.calibration(LOGITS.softmax(1), TARGETS)
    losses = F.cross_entropy(LOGITS, TARGETS, reduction="none")
    hits = (LOGITS.argmax(1) == TARGETS).double()
    assert math.isclose(found.nll, float(losses.mean()), rel_tol=1e-12)
    assert math.isclose(found.nll_error, float(losses.std()) / 200**0.5, rel_tol=1e-12)
    assert math.isclose(found.accuracy, float(hits.mean()), rel_tol=1e-12)
    assert math.isclose(found.accuracy_error, float(hits.std()) / 200**0.5, rel_tol=1e-12)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_the_expected_calibration_error_sums_over_bins(bins: int) -> None:
    p = LOGITS.softmax(1)
    found = hf.calibration(p, TARGETS, bins=bins)
    confidence, chosen = p.max(1)
    expected = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            gap = (chosen == TARGETS)[inside].double().mean() - confidence[inside].mean()
            expected += float(gap.abs()) * int(inside.sum()) / 200
    assert math.isclose(found.ece, expected, rel_tol=1e-10)
    assert int(found.counts.sum()) == 200


def test_certain_and_right_predictions_have_no_error() -> None:
    found = hf.calibration(torch.eye(4)[TARGETS], TARGETS)
    assert (found.nll, found.accuracy, found.ece) == (0.0, 1.0, 0.0)


def test_gaps_of_bins_do_not_cancel() -> None:
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]], dtype=D)
    found = hf.calibration(p, torch.tensor([0, 0, 1, 1]), bins=10)
    assert math.isclose(found.ece, (0.4 + 0.9) / 2)


def test_probabilities_of_one_class_are_those_of_two() -> None:
    p = torch.tensor([0.2, 0.9, 0.6], dtype=D)
    targets = torch.tensor([0.0, 1.0, 0.0])
    two = hf.calibration(torch.stack([1 - p, p], dim=1), targets)
    for given in (p, p[:, None]):
        found = hf.calibration(given, targets)
        assert repr(found) == repr(two)
        assert torch.equal(found.counts, two.counts)


def test_a_calibration_is_saved_and_tabulated(tmp_path: Path) -> None:
    found = hf.calibration(LOGITS.softmax(1), TARGETS, bins=10)
    found.save(tmp_path / "calibration.npz")
    assert repr(hf.load(tmp_path / "calibration.npz")) == repr(found)
    assert list(found._columns()["bin"]) == list(range(10))


@pytest.mark.parametrize(
    ("p", "targets", "message"),
    [
        (LOGITS, TARGETS, "do not sum to one"),
        (LOGITS.softmax(1), TARGETS[:5], "shape"),
        (LOGITS.softmax(1)[:, :3] / LOGITS.softmax(1)[:, :3].sum(1, True), TARGETS, "0 to 2"),
        (LOGITS.softmax(1), TARGETS - 1, "not classes"),
        (LOGITS.softmax(1), TARGETS + 0.5, "not classes"),
    ],
)
def test_wrong_arguments_are_refused(p: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.calibration(p, targets)


def test_boolean_targets_are_the_classes_0_and_1() -> None:
    p = LOGITS[:, 0].sigmoid()
    booleans, classes = hf.calibration(p, TARGETS > 1), hf.calibration(p, (TARGETS > 1).long())
    assert repr(booleans.to_dict()) == repr(classes.to_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_in_16_bits_sum_to_one_up_to_their_rounding(dtype: torch.dtype) -> None:
    wide = hf.calibration(LOGITS.softmax(1), TARGETS)
    narrow = hf.calibration(LOGITS.to(dtype).softmax(1), TARGETS)
    assert math.isclose(narrow.nll, wide.nll, rel_tol=1e-2)


def test_complex_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"probabilities has the dtype torch.complex128"):
        hf.calibration(LOGITS.softmax(1).to(torch.complex128), TARGETS)
    with pytest.raises(TypeError, match="targets has the dtype"):
        hf.calibration(LOGITS.softmax(1), TARGETS.to(torch.complex128))
