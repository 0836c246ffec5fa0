"""The verdict of a check, and how it reads."""

from dataclasses import replace
from pathlib import Path

import hessfunc as hf
from hessfunc.algorithms.results import Check

PASSED = Check(
    nondeterminism=0.0,
    nonlinearity=1e-9,
    asymmetry=1e-9,
    inconsistency=None,
    resolution=None,
    consistent=None,
    tolerance=1e-4,
    problems=(),
    notes=(),
)


def test_a_check_is_true_without_a_problem() -> None:
    assert PASSED
    assert str(PASSED) == "linear, symmetric and deterministic"
    assert replace(PASSED, notes=("a kink",))


def test_problems_and_notes_are_all_that_is_said() -> None:
    failed = replace(PASSED, problems=("not linear", "not symmetric"), notes=("a kink",))
    assert not failed
    assert str(failed).splitlines() == ["not linear", "not symmetric", "a kink"]


def test_no_more_is_promised_of_a_gradient_than_differences_resolve() -> None:
    compared = replace(PASSED, inconsistency=1e-6, resolution=0.03, consistent=True)
    assert "the derivative of the gradient up to 3 %" in str(compared)
    assert "up to 5 %" in str(replace(compared, inconsistency=0.05))


def test_checks_are_saved(tmp_path: Path) -> None:
    for found in (PASSED, replace(PASSED, problems=("not linear", "not symmetric"))):
        found.save(tmp_path / "check.npz")
        assert hf.load(tmp_path / "check.npz") == found
