"""Progress of runs: records for a function, and what they leave unchanged."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.display import Achieved, Progress, reporting
from tests import test_fuzz as fuzz

MATVEC = hf.dense(torch.diag(torch.arange(1.0, 41.0, dtype=torch.float64)))
LIKE = torch.zeros(40, dtype=torch.float64)


def takes_progress(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters
    return "progress" in parameters or "run" in parameters


# Tracking is a context manager, and is tested with the tracker.
RUNS = [
    name
    for name, call in fuzz.CALLS.items()
    if name != "tracked" and takes_progress(call.function or fuzz.FUNCTIONS[name])
]


def test_every_kind_of_run_is_here() -> None:
    assert {"lanczos", "trace", "xdiag", "cg", "slq", "landscape", "block_spectra"} <= set(RUNS)
    assert len(RUNS) > 20


@pytest.mark.parametrize("name", RUNS)
def test_every_run_reports_its_progress(name: str) -> None:
    records: list[Progress] = []
    fuzz.called(name, {"progress": records.append})
    assert records
    assert all(isinstance(record, Progress) for record in records)
    assert all(record.task and record.seconds >= 0 for record in records)
    assert all(record.total is None or 0 < record.done <= record.total for record in records)


def test_progress_of_eigenpairs_counts_the_converged() -> None:
    records: list[Progress] = []
    pairs = hf.lanczos(MATVEC, LIKE, k=3, seed=0, progress=records.append)
    last = records[-1]
    assert (last.matvecs, last.converged, last.wanted) == (pairs.matvecs, 3, 3)
    assert last.value == float(pairs.values[0])
    assert [r.done for r in records] == sorted(r.done for r in records)
    assert "3 of 3 converged" in str(last)
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.done = 0  # type: ignore[misc]


def test_progress_of_a_trace_has_an_interval() -> None:
    records: list[Progress] = []
    estimate = hf.hutchinson(MATVEC, LIKE, max_matvecs=30, seed=0, progress=records.append)
    low, high = estimate.interval()
    assert records[-1].value == estimate.value
    assert records[-1].half_width == pytest.approx((high - low) / 2)
    assert records[-1].budget == 30


def test_progress_changes_no_number() -> None:
    def run(**options: Any) -> Any:
        return hf.lanczos(MATVEC, LIKE, k=4, rtol=1e-4, seed=1, **options)

    plain, watched = run(), run(progress=lambda record: True)
    assert torch.equal(plain.values, watched.values)
    assert torch.equal(plain.vectors, watched.vectors)
    assert plain.reason == watched.reason


def test_a_slow_clock_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hf.hutchinson(MATVEC, LIKE, max_matvecs=20, seed=0)
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    watched = hf.hutchinson(MATVEC, LIKE, max_matvecs=20, seed=0, progress=lambda record: None)
    assert plain.value == watched.value


def test_an_error_of_the_function_ends_the_run() -> None:
    def broken(record: Progress) -> None:
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        hf.hutchinson(MATVEC, LIKE, seed=0, progress=broken)


@pytest.mark.parametrize("wrong", [3, "yes", dict, torch.nn.Tanh()])
def test_other_values_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="progress must be True, False or a function"):
        hf.hutchinson(MATVEC, LIKE, progress=wrong)


def test_a_record_as_a_line() -> None:
    record = Progress(
        task="Hutchinson", done=1200, total=5000, value=36.04, half_width=2.5, seconds=61
    )
    assert str(record) == "Hutchinson: 1,200 of 5,000 matvecs, 36.04 ± 2.5, 61 s"
    other = Progress(task="tracked", done=10, total=None, unit="steps")
    assert str(other) == "tracked: 10 steps, 0 s"
    assert (other.matvecs, other.budget) == (None, None)


def test_without_progress_nothing_is_reported() -> None:
    for nothing in (None, False):
        with reporting(nothing, "task", total=3) as report:
            assert report is None
    records: list[Progress] = []
    with reporting(records.append, "task", total=3, unit="batches") as report:
        assert report is not None
        report(2, Achieved(value=1.0))
    assert (records[0].done, records[0].value, records[0].unit) == (2, 1.0, "batches")
