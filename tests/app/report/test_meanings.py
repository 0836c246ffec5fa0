"""Sentences that interpret the numbers of an analysis."""

from __future__ import annotations

from typing import Any

import pytest

from hessfunc.app.report import as_json
from hessfunc.app.report.meanings import meaning
from hessfunc.app.report.rows import plain
from tests.app.report.cases import PARTS


def said(name: str, **changed: Any) -> str:
    part = next(part for part in PARTS if part.name == name)
    return plain(meaning(name, {**as_json(part), **changed}, "Hessian"))


def test_gradient_descent_is_stable_below_two_over_the_largest_eigenvalue() -> None:
    assert said("eigenvalues").endswith("gradient descent is stable below a step size of 0.4.")
    assert said("eigenvalues", stable_step=None) == ""


@pytest.mark.parametrize(
    ("value", "residual", "words"),
    [
        (-2.5, 0.1, "has a negative eigenvalue"),
        (2.5, 0.1, "is positive"),
        (-0.05, 0.1, "zero within its residual"),
        (None, 0.1, ""),
    ],
)
def test_the_sign_of_the_smallest_eigenvalue(value: Any, residual: float, words: str) -> None:
    text = said("smallest", values=[value], residuals=[residual], converged=[True])
    assert words in text
    assert bool(text) == bool(words)


def test_the_number_of_eigenvalues_above_a_tenth_of_the_largest() -> None:
    count = {"above": 0.4, "low": 10, "high": 13}
    assert "10 to 13 eigenvalues are above 0.4." in said("density", count=count)
    same = {"above": 0.4, "low": 2, "high": 2}
    assert "confidence, 2 eigenvalues are above 0.4." in said("density", count=same)
    assert said("density", count=None) == ""


def test_the_lowest_loss_of_a_line() -> None:
    assert said("line") == "On this line, the loss is lowest at the parameters."
    assert "lowest, 0.125, at -0.5" in said("line", x=[-0.5, 0.0], values=[0.125, 0.25])
    assert said("line", x=[0.0], values=[None]) == ""


def test_the_mean_eigenvalue() -> None:
    assert "mean of all eigenvalues is 0.25." in said("trace", mean_eigenvalue=0.25)
