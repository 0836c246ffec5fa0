"""How often intervals cover, and how wide they are, for every estimator of traces and diagonals.

    python -m bench.coverage [--seeds 1000] [--only xtrace] [--minutes 5] [--jobs 2]

Eleven spectra of n = 120 and a matrix of zeros, at fixed budgets from 3 products on and under
adaptive stops, at the levels 80, 90, 95 and 99 %. An interval should cover at most 2 points less
often than its level says, and its median half-width should be at most twice the same quantile of
the true error, or 2.5 times below 10 products, where the error is more than rounding. For diagonals
both are taken entry by entry: coverage is the mean over entries, the ratio is the median.

A confidence sequence covers if its intervals after all rounds of a run do, so that it needs no rows
of tolerances.

Results are written to bench/results/coverage.json after each spectrum of an estimator, and their
rows replaced in coverage.md. A run continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.statistics import anytime_quantile, student_quantile
from hessfunc.trees import Matvec, leaves

N = 120
LEVELS = (0.8, 0.9, 0.95, 0.99)
RESULTS = Path(__file__).parent / "results" / "coverage.json"
# An error below this share of the matrix is rounding, to which no width is compared.
ROUNDING = 1e-11

Stop = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An estimator with the budgets and tolerances at which it is tried.

    Attributes:
        run: Function of a matvec, a tree like one vector, a seed and a stop, that returns a result,
            or the results of all rounds of a run.
        stops: Options of each run.
        rotated: Whether the matrix has a random eigenbasis, which matters to random signs.
        diagonal: Whether the diagonal is estimated, rather than the trace.
        definite: Whether the matrix must have no negative eigenvalue.
        truth: Function of the matvec that returns the estimated number; by default the trace.
        shortfall: Points by which few probes are documented to cover less than the level says.
    """

    run: Callable[..., Any]
    stops: tuple[Stop, ...]
    rotated: bool = False
    diagonal: bool = False
    definite: bool = False
    truth: Callable[[Matvec], float] | None = None
    shortfall: float = 0.0

    def takes(self, values: Tensor) -> bool:
        """Whether the case is tried on a matrix with these eigenvalues."""
        return not (self.definite and bool((values < 0).any())) and not (
            self.truth is not None and not bool(values.any())
        )


def _budgets(*budgets: int) -> tuple[Stop, ...]:
    return tuple({"max_matvecs": budget} for budget in budgets)


def _tolerances(*tolerances: float) -> tuple[Stop, ...]:
    return tuple({"rtol": rtol, "max_matvecs": 110} for rtol in tolerances)


def deflated(matvec: Matvec, like: Tensor, *, seed: int, **options: Any) -> hf.results.Estimate:
    """Hutchinson's estimate beside three eigenpairs, whose products are not counted."""
    with warnings.catch_warnings():
        # Repeated eigenvalues are missed on purpose: the complement is unbiased all the same.
        warnings.simplefilter("ignore")
        top = hf.lanczos(matvec, like, k=3, rtol=1e-2, seed=seed)
    return hf.hutchinson(matvec, like, deflate=top, kind="sphere", seed=seed, **options)


def sampled(
    matvec: Matvec, like: Tensor, *, seed: int, **options: Any
) -> hf.results.SampledEstimate:
    """The trace from random ones of 30 batches, the matrix plus multiples of the identity."""
    shifts = torch.linspace(-1, 1, 30, dtype=torch.float64).tolist()
    scale = float(matvec(torch.eye(N, dtype=torch.float64)).square().sum() / N) ** 0.5

    def curvature(params: Tensor, shift: float) -> Matvec:
        return lambda block: matvec(block) + scale * shift * block

    draws = hf.draws(curvature, weight=lambda shift: 1.0, seed=seed)(like, shifts)
    return hf.sampled_trace(draws, like, probes=2, seed=seed, **options)


def weighed(matvec: Matvec, like: Tensor, **options: Any) -> hf.results.SampledEstimate:
    """The trace from ones of 500 multiples of the matrix, drawn by a proxy of their sizes."""

    def curvature(params: Tensor, batch: tuple[float, float]) -> Matvec:
        return lambda block: batch[0] * matvec(block)

    draws = hf.draws(
        curvature,
        weight=lambda batch: 1.0,
        proxy=lambda params, batch: batch[1],
        seed=options["seed"],
    )(like, heavy_batches())
    return hf.sampled_trace(draws, like, probes=2, **options)


@cache
def heavy_batches() -> list[tuple[float, float]]:
    """Sizes of batches, of which a few dominate, and proxies of the sizes, both log-normal."""
    sizes, noise = torch.randn(2, 500, generator=torch.Generator().manual_seed(3)).double()
    proxies = (2 * sizes + noise / 2).exp()
    return list(zip((2 * sizes).exp().tolist(), proxies.tolist(), strict=True))


def of_batches(matvec: Matvec) -> float:
    """The trace of the mean of `heavy_batches`."""
    trace = float(matvec(torch.eye(N, dtype=torch.float64)).trace())
    return trace * sum(size for size, _ in heavy_batches()) / len(heavy_batches())


def sequence(
    estimator: Callable[..., hf.results.Estimate], matvec: Matvec, like: Tensor, **options: Any
) -> list[hf.results.Estimate]:
    """The estimates of a confidence sequence after each round."""
    rounds: list[hf.results.Estimate] = []
    last = estimator(matvec, like, confidence="anytime", callback=rounds.append, **options)
    return [*rounds, last]


def from_start(matvec: Matvec, like: Tensor, *, seed: int, **options: Any) -> hf.results.Estimate:
    """The trace from three eigenpairs, whose products are not counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = hf.lanczos(matvec, like, k=3, rtol=1e-2, seed=seed)
    return hf.trace(matvec, like, start=top, seed=seed, **options)


def in_blocks(quantity: str) -> Case:
    """The error of 0.8 times the four diagonal blocks of a matrix, as its approximation."""

    def parts(rows: Tensor) -> dict[str, Tensor]:
        return {str(i): part for i, part in enumerate(rows.split(N // 4, -1))}

    def matrices(matvec: Matvec) -> tuple[Tensor, Tensor, Tensor]:
        matrix = matvec(torch.eye(N, dtype=torch.float64))
        own = torch.block_diag(*torch.ones(4, N // 4, N // 4, dtype=torch.float64)) * matrix
        return matrix, own, 0.8 * own

    def truth(matvec: Matvec) -> float:
        matrix, own, near = matrices(matvec)
        if quantity == "distance":
            return float((matrix - near).norm() / matrix.norm())
        return 1 - float(own.square().sum() / matrix.square().sum())

    def run(matvec: Matvec, like: Tensor, **options: Any) -> hf.results.Estimate:
        matrix, _, near = matrices(matvec)
        products = (
            lambda tree, a=a: parts(torch.cat(list(tree.values()), 1) @ a) for a in (near, matrix)
        )
        return getattr(hf.kronecker.error(*products, parts(like), **options), quantity)

    return Case(run, _budgets(10, 20, 40, 100), rotated=True, truth=truth, shortfall=0.09)


CASES = {
    "trace": Case(hf.trace, _budgets(3, 5, 10, 20, 40, 70) + _tolerances(0.1, 0.03, 0.01)),
    "trace, with eigenpairs": Case(from_start, _budgets(3, 10, 30) + _tolerances(0.03)),
    "trace, anytime": Case(partial(sequence, hf.trace), _budgets(30, 70)),
    "hutchinson": Case(
        partial(hf.hutchinson, kind="sphere"), _budgets(3, 5, 10, 30) + _tolerances(0.1, 0.03)
    ),
    "hutchinson, signs": Case(
        partial(hf.hutchinson, kind="signs"),
        _budgets(3, 5, 10, 30) + _tolerances(0.1, 0.03),
        rotated=True,
    ),
    "hutchinson, deflated": Case(deflated, _budgets(3, 10) + _tolerances(0.03)),
    "hutchinson, anytime": Case(
        partial(sequence, partial(hf.hutchinson, kind="sphere", block_size=2)),
        _budgets(30, 100),
    ),
    "hutchpp": Case(hf.hutchpp, _budgets(6, 12, 30, 60) + _tolerances(0.1, 0.03)),
    "xtrace": Case(hf.xtrace, _budgets(4, 6, 10, 20, 40, 70) + _tolerances(0.1, 0.03)),
    "xnystrace": Case(
        hf.xnystrace, _budgets(3, 5, 10, 20, 40) + _tolerances(0.1, 0.03), definite=True
    ),
    "sampled_trace": Case(sampled, _budgets(20, 40, 60, 90) + _tolerances(0.1), rotated=True),
    "sampled_trace, proxy": Case(weighed, _budgets(80, 200), rotated=True, truth=of_batches),
    "diagonal": Case(
        hf.diagonal, _budgets(3, 5, 10, 30) + _tolerances(0.3, 0.1), rotated=True, diagonal=True
    ),
    "hutchinson_diagonal": Case(
        hf.hutchinson_diagonal, _budgets(3, 5, 10, 30) + _tolerances(0.3), True, True
    ),
    "xdiag": Case(hf.xdiag, _budgets(4, 6, 10, 20, 40) + _tolerances(0.3), True, True),
    "kronecker.error, distance": in_blocks("distance"),
    "kronecker.error, off the blocks": in_blocks("off_diagonal"),
}


@cache
def spectra(n: int = N) -> dict[str, Tensor]:
    """The eigenvalues of eleven matrices, and of zero."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    outliers = torch.tensor([100, 60, 30, 20, 10, 8, 6, 5, 4, 3], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    bulk = 0.02 * torch.randn(n - 10, dtype=torch.float64, generator=generator)
    return {
        "10 outliers and a bulk": torch.cat([outliers, bulk.abs()]),
        "i^-0.5": i**-0.5,
        "i^-1": i**-1,
        "i^-2": i**-2,
        "0.9^i": 0.9**i,
        "10 ones, 1e-3": torch.where(i <= 10, 1.0, 1e-3).double(),
        "three steps": torch.where(i <= 8, 1.0, torch.where(i <= 20, 0.1, 1e-3)).double(),
        "+-1/i": torch.where(i % 2 == 0, -1.0, 1.0).double() / i,
        "linspace(1, 3)": torch.linspace(1, 3, n, dtype=torch.float64),
        "rank one": torch.where(i == 1, 1.0, 0.0).double(),
        "linspace(-1, 1)": torch.linspace(-1, 1, n, dtype=torch.float64),
        "zero": 0 * i,
    }


@cache
def _eigenbasis() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator)).Q


def measured(case: Case, spectrum: str, seeds: int) -> Iterator[dict[str, Any]]:
    """Try a case on a spectrum: one row for each stop."""
    values = spectra()[spectrum]
    like = torch.zeros(N, dtype=torch.float64)
    truth, matvec = values.sum(), _scaled(values)
    if case.rotated:
        matrix = _eigenbasis() * values @ _eigenbasis().mT
        matrix = (matrix + matrix.mT) / 2
        matvec = hf.dense(matrix)
        truth = matrix.diagonal() if case.diagonal else truth
    if case.truth is not None:
        truth = torch.tensor(case.truth(matvec), dtype=torch.float64)
    scale = float(values.abs().sum()) or 1.0
    for stop in case.stops:
        runs = [_rounds(case.run(matvec, like, seed=seed, **stop)) for seed in range(seeds)]
        found = [rounds[-1] for rounds in runs]
        errors = torch.stack([_error(one, truth) for one in found])
        covered, ratios = [], []
        for level in LEVELS:
            inside = [
                torch.stack(
                    [_error(one, truth) <= _width(one, level) + 1e-15 * scale for one in run]
                )
                for run in runs
            ]
            covered.append(float(torch.stack([rows.all(0) for rows in inside]).double().mean()))
            true = errors.quantile(level, dim=0)
            widths = torch.stack([_width(one, level) for one in found])
            ratio = float((widths.median(0).values / true).median())
            ratios.append(ratio if float(true.median()) > ROUNDING * scale else None)
        yield {
            "stop": f"rtol {stop['rtol']}" if "rtol" in stop else f"{stop['max_matvecs']} products",
            "covered": covered,
            "ratios": ratios,
            "products": sum(one.matvecs for one in found) / seeds,
        }


def _rounds(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _error(one: Any, truth: Tensor) -> Tensor:
    return (_tensor(one.value) - truth).abs()


def _width(one: Any, level: float) -> Tensor:
    return _tensor(one.stderr) * _quantile(getattr(one, "confidence", "fixed"), level, one.degrees)


@cache
def _quantile(confidence: str, level: float, degrees: int) -> float:
    if confidence == "anytime":
        return anytime_quantile(level, degrees)
    return student_quantile((1 + level) / 2, degrees)


def _tensor(value: Tensor | float) -> Tensor:
    return leaves(value)[0] if isinstance(value, Tensor) else torch.tensor(value).double()


def _scaled(values: Tensor) -> Matvec:
    return lambda block: block * values


def too_little(row: dict[str, Any], points: float = 0.02) -> bool:
    """Whether an interval of the row covers this much less often than its level says."""
    return any(share < level - points for share, level in zip(row["covered"], LEVELS, strict=True))


def _too_wide(row: dict[str, Any]) -> bool:
    most = 2.5 if row["products"] < 10 else 2.0
    return any(ratio is not None and ratio > most for ratio in row["ratios"])


HEADER = (
    "| estimator | spectrum | stop | at 80 % | at 90 % | at 95 % | at 99 % "
    "| half-width / error at 95 % | products | seeds |",
    "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
)


def table(results: dict[str, dict[str, Any]], before: str = "") -> str:
    """A table in Markdown, with all rows of the results and those of a table before for others."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in before.splitlines()[len(HEADER) :]:
        name, spectrum = (cell.strip() for cell in line.split("|")[1:3])
        rows.setdefault((name, spectrum), []).append(line)
    for name, found in results.items():
        for spectrum, result in found.items():
            rows[name, spectrum] = [_line(name, spectrum, row, result) for row in result["rows"]]
    ordered = [rows.get((name, spectrum), []) for name in CASES for spectrum in spectra()]
    return "\n".join([*HEADER, *(line for lines in ordered for line in lines)]) + "\n"


def _line(name: str, spectrum: str, row: dict[str, Any], result: dict[str, Any]) -> str:
    covered = " | ".join(f"{100 * share:.1f} %" for share in row["covered"])
    ratio = row["ratios"][LEVELS.index(0.95)]
    shown = "rounding" if ratio is None else f"{ratio:.2f}"
    return (
        f"| {name} | {spectrum} | {row['stop']} | {covered} | {shown} | "
        f"{row['products']:.0f} | {result['seeds']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="Number of seeds of each row.")
    parser.add_argument("--only", choices=list(CASES), help="Estimator to run.")
    parser.add_argument("--minutes", type=float, help="Stop after this long, to continue later.")
    parser.add_argument("--jobs", type=int, default=1, help="Number of processes.")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * (arguments.minutes or 1e9)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    todo = [
        (name, spectrum)
        for name in ([arguments.only] if arguments.only else CASES)
        for spectrum, values in spectra().items()
        if results.get(name, {}).get(spectrum, {}).get("seeds", 0) < arguments.seeds
        and CASES[name].takes(values)
    ]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        found = [pool.submit(_rows, *one, arguments.seeds, end) for one in todo]
        for (name, spectrum), future in zip(todo, found, strict=True):
            rows = future.result()
            if not rows:
                print("stopped early: run it again to continue")
                return
            results.setdefault(name, {})[spectrum] = {"seeds": arguments.seeds, "rows": rows}
            _write(results)
            for row in rows:
                covered = " ".join(f"{100 * share:5.1f}" for share in row["covered"])
                ratios = " ".join("  - " if r is None else f"{r:4.2f}" for r in row["ratios"])
                marks = "low " * too_little(row) + "wide" * _too_wide(row)
                print(name, spectrum, row["stop"], covered, ratios, marks, sep="  ", flush=True)


def _rows(name: str, spectrum: str, seeds: int, end: float) -> list[dict[str, Any]]:
    """All rows of a case on a spectrum, in a process of its own; none after the end."""
    torch.set_num_threads(1)
    return list(measured(CASES[name], spectrum, seeds)) if time.monotonic() < end else []


def _write(results: dict[str, dict[str, Any]]) -> None:
    """Write all results, and replace their rows in the table."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1))
    shown = RESULTS.with_suffix(".md")
    shown.write_text(table(results, shown.read_text() if shown.exists() else ""))


if __name__ == "__main__":
    main()
