from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch

import hessfunc as hf
from bench.speed import models, ours, plain, trace
from bench.speed.asked import Asked
from bench.speed.trace import Traced
from bench.speed.turns import Effort

OURS = [method for method in trace.METHODS if method.kind == "ours"]


def few_samples(asked: Asked, seed: int) -> Traced:
    """Hutchinson's, as other libraries have it: so many samples, and no rule."""
    matvec, params = ours.matvec_of(asked)
    found = hf.hutchinson(matvec, params, max_matvecs=8, seed=seed)
    samples = found.samples.tolist()
    return Traced(statistics.mean(samples), len(samples), samples)


def broken(asked: Asked, seed: int) -> Traced:
    raise RuntimeError("out of order")


def method(
    title: str, estimate: Callable[[Asked, int], Traced], independent: bool = False
) -> trace._Method:
    return trace._Method(title, "", "peer", estimate, "as shipped", independent)


@pytest.mark.slow
def test_few_samples_are_priced_at_as_many_as_the_accuracy_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = [*OURS, method("few", few_samples, True), method("broken", broken)]
    monkeypatch.setattr(trace, "METHODS", methods)
    cell = trace.trace("mlp-small", Effort(0.0, 3), examples=8)
    few, enough = cell.rows["few"], cell.rows["few, to 2 %"]
    assert cell.gaps == {"broken": "RuntimeError: out of order"}
    assert all(cell.rows[one.title].error < 2 * trace.ACCURACY for one in OURS)
    assert few.error > trace.ACCURACY
    # The error of few samples is that of their spread at the least.
    assert enough.products <= math.ceil(few.products * (few.error / trace.ACCURACY) ** 2)
    share = enough.gradients.median / few.gradients.median
    assert share == pytest.approx(enough.products / few.products)


def test_the_parts_of_a_batch_have_its_hessian() -> None:
    asked = Asked(models.made("mlp-small", 60), k=2)
    torch.testing.assert_close(plain.expected(trace._in_parts(asked)), plain.expected(asked))


@pytest.mark.slow
def test_where_no_other_library_is_there_ours_is_priced_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "METHODS", [*OURS, method("broken", broken)])
    cell = trace.trace("mlp-small", Effort(0.0, 1), examples=8)
    assert {row.kind for row in cell.rows.values()} == {"ours"}
    assert {one.title for one in OURS} <= set(cell.rows)
