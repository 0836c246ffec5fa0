"""Critical sharpness as a result."""

from dataclasses import replace
from pathlib import Path

import pytest

import hessfunc as hf
from hessfunc.algorithms.results import Sharpness

FOUND = Sharpness(
    value=20.0,
    step=0.1,
    bounds=(0.09, 0.1),
    evaluations=7,
    matvecs=0,
    passes=0,
    reason="converged: the bounds are within rtol=0.2",
    seed=None,
)


def test_it_has_converged_where_its_reason_says_so() -> None:
    assert FOUND.converged
    assert not replace(FOUND, reason="budget exhausted after 7 evaluations").converged


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "sharpness.npz")
    loaded = hf.load(tmp_path / "sharpness.npz")
    assert isinstance(loaded, Sharpness)
    assert tuple(loaded.bounds) == FOUND.bounds
    assert (loaded.value, loaded.step, loaded.evaluations) == (20.0, 0.1, 7)


def test_the_headline_has_the_value_within_its_bounds() -> None:
    for number in ("20", "[0.09, 0.1]", "7"):
        assert number in repr(FOUND)


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        FOUND.value = 1.0  # type: ignore[misc]
