"""Intervals hold what they claim; ``python -m bench.coverage`` tries it over 1,000 seeds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import hessfunc as hf
from bench.coverage import CASES, HEADER, LEVELS, Case, N, measured, spectra, table

# Four binomial standard errors of so many seeds, beside the two points that are promised.
SEEDS = 24
SLACK = {level: 0.02 + 4 * (level * (1 - level) / SEEDS) ** 0.5 for level in LEVELS}
TRIED = ("10 outliers and a bulk", "10 ones, 1e-3", "+-1/i", "linspace(1, 3)", "rank one")


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", TRIED)
@pytest.mark.parametrize("name", CASES)
def test_intervals_cover_and_are_not_huge(name: str, spectrum: str) -> None:
    case = CASES[name]
    if not case.takes(spectra()[spectrum]):
        pytest.skip("indefinite")
    # Some budgets, and the loosest tolerance.
    budgets = [stop for stop in case.stops if stop.keys() == {"max_matvecs"}]
    tolerances = [stop for stop in case.stops if "rtol" in stop]
    stops = [stop for stop in budgets if stop["max_matvecs"] not in (5, 12, 40, 70)]
    for row in measured(replace(case, stops=(*stops, *tolerances[:1])), spectrum, SEEDS):
        for level, share in zip(LEVELS, row["covered"], strict=True):
            assert share >= level - SLACK[level] - case.shortfall, row
        # A sequence holds at all stops, at a width that depends on all of them.
        if row["products"] >= 20 and not name.endswith("anytime"):
            assert all(ratio is None or ratio < 4 for ratio in row["ratios"][:3]), row


@pytest.mark.parametrize("budget", [3, 5, 20])
@pytest.mark.parametrize("spectrum", ["rank one", "10 outliers and a bulk", "linspace(1, 3)"])
def test_few_probes_know_their_error(spectrum: str, budget: int) -> None:
    values, like = spectra()[spectrum], torch.zeros(N, dtype=torch.float64)
    options = {"kind": "sphere", "max_matvecs": budget, "block_size": budget}
    runs = [hf.hutchinson(lambda v: v * values, like, seed=s, **options) for s in range(200)]
    errors = torch.tensor([abs(run.value - float(values.sum())) for run in runs])
    for level in LEVELS:
        widths = torch.tensor([run.interval(level)[1] - run.value for run in runs])
        slack = 0.02 + 4 * (level * (1 - level) / 200) ** 0.5
        assert float((errors <= widths).double().mean()) >= level - slack
        assert float(widths.median() / errors.quantile(level)) < (5 if budget < 10 else 2)


@pytest.mark.parametrize("outliers", [1, 5, 10])
def test_as_many_probes_as_equal_outliers(outliers: int) -> None:
    """All leave-one-out estimates may then be too small by one outlier, and agree."""
    values = torch.where(torch.arange(N) < outliers, 1.0, 1e-3).double()
    like, covered = torch.zeros(N, dtype=torch.float64), 0
    for seed in range(100):
        found = hf.xtrace(lambda v: v * values, like, max_matvecs=max(4, 2 * outliers), seed=seed)
        low, high = found.interval(0.95)
        covered += low <= float(values.sum()) <= high
    assert covered >= 88


def test_a_sequence_covers_if_all_of_its_rounds_do() -> None:
    def rounds(*errors: float) -> list[SimpleNamespace]:
        values = [float(spectra()["i^-1"].sum()) + error for error in errors]
        return [SimpleNamespace(value=v, stderr=1.0, degrees=9, matvecs=9) for v in values]

    far, near = rounds(9.0, 0.1), rounds(0.1, 0.2)
    case = Case(lambda *_, seed, **__: far if seed % 2 else near, ({"max_matvecs": 9},))
    (row,) = measured(case, "i^-1", 10)
    assert row["covered"] == [0.5] * 4
    assert row["products"] == 9


def _row(stop: str, share: float) -> dict[str, object]:
    return {"stop": stop, "covered": [share] * 4, "ratios": [1.0, 1.0, None, 1.0], "products": 4.2}


def test_only_measured_rows_are_replaced() -> None:
    before = table(
        {
            "hutchpp": {"zero": {"seeds": 10, "rows": [_row("6 products", 0.5)]}},
            "xtrace": {
                "zero": {"seeds": 10, "rows": [_row("4 products", 0.5), _row("6 products", 0.5)]},
                "i^-1": {"seeds": 10, "rows": [_row("4 products", 0.5)]},
            },
        }
    )
    assert table({}, before) == before
    after = table({"xtrace": {"zero": {"seeds": 20, "rows": [_row("4 products", 0.9)]}}}, before)
    half, most = " | ".join(["50.0 %"] * 4), " | ".join(["90.0 %"] * 4)
    assert after.splitlines() == [
        *HEADER,
        f"| hutchpp | zero | 6 products | {half} | rounding | 4 | 10 |",
        f"| xtrace | i^-1 | 4 products | {half} | rounding | 4 | 10 |",
        f"| xtrace | zero | 4 products | {most} | rounding | 4 | 20 |",
    ]
