"""How often intervals of log det, effective dimensions and counts of eigenvalues cover.

    python -m bench.functions [--seeds 200]

Ten positive semi-definite spectra of n = 120, damped by 1 % of the mean eigenvalue. `logdet` runs
with a tolerance and with fixed budgets; effective dimensions and counts come from `slq`. Shares of
covered runs at four levels, and the median half-width relative to the 95 % quantile of the error,
go to bench/results/functions.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import hessfunc as hf
from bench.coverage import LEVELS, N, spectra

RESULTS = Path(__file__).parent / "results" / "functions.md"
HEADER = (
    "| quantity | spectrum | run | at 80 % | at 90 % | at 95 % | at 99 % "
    "| half-width / error at 95 % | products | seeds |",
    "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
)
# Intervals at all levels, the estimate and the products of a run.
Outcome = tuple[list[tuple[float, float]], float, int]


Truth = tuple[float, Callable[[int], Outcome]]


def _logdet(values: Tensor, damping: float, **stop: float) -> Truth:
    def run(seed: int) -> Outcome:
        found = hf.logdet(
            lambda block: block * values,
            torch.zeros(N, dtype=torch.float64),
            damping=damping,
            smallest=0.0,
            seed=seed,
            **stop,  # type: ignore[arg-type]
        )
        return [found.interval(level) for level in LEVELS], found.value, found.matvecs

    return float(torch.log(values + damping).sum()), run


def _density(values: Tensor, seed: int) -> hf.results.Density:
    like = torch.zeros(N, dtype=torch.float64)
    return hf.slq(lambda block: block * values, like, probes=2, steps=10, seed=seed)


def _dimension(values: Tensor, damping: float) -> Truth:
    def run(seed: int) -> Outcome:
        density = _density(values, seed)
        found = density.effective_dimension(damping)
        return [found.interval(level) for level in LEVELS], found.value, density.matvecs

    return float((values / (values + damping)).sum()), run


def _count(values: Tensor, x: float) -> Truth:
    def run(seed: int) -> Outcome:
        density = _density(values, seed)
        intervals = [density.count_above(x, level) for level in LEVELS]
        return intervals, sum(intervals[2]) / 2, density.matvecs

    return float((values > x).sum()), run


def rows(seeds: int) -> Iterator[str]:
    """Yield the rows of the table."""
    for name, values in spectra().items():
        if bool((values < 0).any()):
            continue
        damping = 0.01 * float(values.mean()) or 0.01
        cases = {
            ("log det", "rtol 0.03"): _logdet(values, damping, rtol=0.03, max_matvecs=400),
            ("log det", "10 products"): _logdet(values, damping, max_matvecs=10),
            ("log det", "40 products"): _logdet(values, damping, max_matvecs=40),
            ("effective dimension", "2 probes, 10 steps"): _dimension(values, damping),
            ("count above the mean", "2 probes, 10 steps"): _count(values, float(values.mean())),
        }
        for (quantity, stop), (truth, run) in cases.items():
            found = [run(seed) for seed in range(seeds)]
            slack = 1e-10 * max(1.0, abs(truth))
            ends = torch.tensor([intervals for intervals, _, _ in found], dtype=torch.float64)
            covered = (ends[..., 0] - slack <= truth) & (truth <= ends[..., 1] + slack)
            shares = " | ".join(f"{100 * s:.1f} %" for s in covered.double().mean(0).tolist())
            errors = torch.tensor([abs(value - truth) for _, value, _ in found])
            error = float(errors.double().quantile(0.95))
            half = float((ends[:, 2, 1] - ends[:, 2, 0]).median()) / 2
            ratio = f"{half / error:.2f}" if error > slack else "rounding"
            products = sum(matvecs for _, _, matvecs in found) / seeds
            cells = (quantity, name, stop, shares, ratio, f"{products:.0f}", str(seeds))
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of log det, dimensions and counts.")
    parser.add_argument("--seeds", type=int, default=200, help="Number of seeds of each row.")
    lines = list(HEADER)
    for line in rows(parser.parse_args().seeds):
        lines.append(line)
        print(line, flush=True)
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
