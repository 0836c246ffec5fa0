"""How often intervals cover, and how wide they are: every trace and diagonal estimator.

    python -m bench.coverage [--seeds 1000] [--only xtrace]

On six spectra of n = 1000, at fixed budgets and under the adaptive stop. Covered must be at least
93 %, and the median half-width at most twice the 95 % quantile of the true error, but for cases
whose error is only rounding, below 1e-12 of the trace. For diagonals both are taken entry by
entry: coverage is the mean over entries, the ratio the median. Results are written to
bench/results/coverage.md after each estimator; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.trees import Matvec

N = 1000
RESULTS = Path(__file__).parent / "results" / "coverage.json"


def deflated(matvec: Matvec, like: Tensor, *, seed: int, **options: Any) -> hf.Estimate:
    """Hutchinson's estimate beside five eigenpairs, whose products are not counted."""
    with warnings.catch_warnings():
        # Repeated eigenvalues are missed on purpose: the complement is unbiased all the same.
        warnings.simplefilter("ignore")
        top = hf.lanczos(matvec, like, k=5, rtol=1e-2, seed=seed)
    return hf.hutchinson(matvec, like, deflate=top, kind="sphere", seed=seed, **options)


TRACES: dict[str, Callable[..., hf.Estimate]] = {
    "hutchinson": hf.hutchinson,
    "deflated hutchinson": deflated,
    "hutchpp": hf.hutchpp,
    "xtrace": hf.xtrace,
    "xnystrace": hf.xnystrace,
}
DIAGONALS = {"hutchinson_diagonal": hf.hutchinson_diagonal, "xdiag": hf.xdiag}
FIXED: list[dict[str, Any]] = [{"max_matvecs": m} for m in (30, 70, 120)]
ADAPTIVE: list[dict[str, Any]] = [{"rtol": r, "max_matvecs": 300} for r in (0.1, 0.03, 0.01)]
ADAPTIVE_DIAGONAL: list[dict[str, Any]] = [{"rtol": r, "max_matvecs": 300} for r in (0.3, 0.1)]
ROUNDING = 1e-12


def spectra() -> dict[str, Tensor]:
    i = torch.arange(1, N + 1, dtype=torch.float64)
    return {
        "linspace(1, 3)": torch.linspace(1, 3, N, dtype=torch.float64),
        "i^-2": i**-2,
        "0.9^i": 0.9**i,
        "0.7^i": 0.7**i,
        "50 ones, 1e-3": torch.where(i <= 50, 1.0, 1e-3).double(),
        "50 ones, 1e-8": torch.where(i <= 50, 1.0, 1e-8).double(),
    }


def eigenbasis() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator)).Q


def traces(estimator: Callable[..., hf.Estimate], seeds: int) -> Iterator[list[object]]:
    basis, like = eigenbasis(), torch.zeros(N, dtype=torch.float64)
    for name, spectrum in spectra().items():
        matrix, trace = basis * spectrum @ basis.mT, float(spectrum.sum())
        matvec = hf.dense((matrix + matrix.mT) / 2)
        if estimator is not hf.hutchinson:
            # The eigenbasis makes no difference to probes on the sphere.
            matvec = scaled(spectrum)
        for options in FIXED + ADAPTIVE:
            found = [estimator(matvec, like, seed=seed, **options) for seed in range(seeds)]
            errors = torch.tensor([abs(one.value - trace) for one in found])
            widths = torch.tensor([one.interval()[1] - one.value for one in found])
            quantile = float(errors.quantile(0.95))
            ratio = float(widths.median()) / quantile if quantile > ROUNDING * trace else None
            yield row(name, options, errors <= widths, quantile / trace, ratio, found)


def scaled(spectrum: Tensor) -> Matvec:
    return lambda block: block * spectrum


def diagonals(estimator: Callable[..., hf.DiagonalEstimate], seeds: int) -> Iterator[list[object]]:
    basis, like = eigenbasis(), torch.zeros(N, dtype=torch.float64)
    for name, spectrum in spectra().items():
        matrix = basis * spectrum @ basis.mT
        matrix = (matrix + matrix.mT) / 2
        diagonal, matvec = matrix.diagonal(), hf.dense(matrix)
        for options in FIXED + ADAPTIVE_DIAGONAL:
            found = [estimator(matvec, like, seed=seed, **options) for seed in range(seeds)]
            errors = torch.stack([(one.value - diagonal).abs() for one in found])
            widths = torch.stack([one.interval()[1] - one.value for one in found])
            quantiles = errors.quantile(0.95, dim=0)
            ratio = float((widths.median(0).values / quantiles).median())
            relative = float((errors.norm(dim=1) / diagonal.norm()).quantile(0.95))
            yield row(name, options, errors <= widths, relative, ratio, found)


def row(
    name: str,
    options: dict[str, Any],
    covered: Tensor,
    error: float,
    ratio: float | None,
    found: list[Any],
) -> list[object]:
    stop = f"rtol {options['rtol']}" if "rtol" in options else f"{options['max_matvecs']} products"
    matvecs = sum(one.matvecs for one in found) / len(found)
    return [name, stop, float(covered.double().mean()), error, ratio, matvecs]


def table(results: dict[str, Any]) -> str:
    lines = [
        "| estimator | spectrum | stop | covered | 95 % error, relative | half-width / error "
        "| products |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        for spectrum, stop, covered, error, ratio, matvecs in rows["rows"]:
            shown = "rounding" if ratio is None else f"{ratio:.2f}"
            lines.append(
                f"| {name} | {spectrum} | {stop} | {100 * covered:.1f} % | {error:.1e} | {shown} "
                f"| {matvecs:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--only", choices=[*TRACES, *DIAGONALS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in [arguments.only] if arguments.only else [*TRACES, *DIAGONALS]:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if results.get(name, {}).get("seeds") == arguments.seeds:
            continue
        rows = (
            traces(TRACES[name], arguments.seeds)
            if name in TRACES
            else diagonals(DIAGONALS[name], arguments.seeds)
        )
        found = []
        for one in rows:
            found.append(one)
            print(name, *one, flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = {"seeds": arguments.seeds, "rows": found}
        RESULTS.write_text(json.dumps(results, indent=1))
        RESULTS.with_suffix(".md").write_text(table(results))
    worst = [
        (name, *one)
        for name, result in json.loads(RESULTS.read_text()).items()
        for one in result["rows"]
        if one[2] < 0.93 or (one[4] or 0) > 2
    ]
    print("every case holds" if not worst else "\n".join(map(str, worst)))


if __name__ == "__main__":
    main()
