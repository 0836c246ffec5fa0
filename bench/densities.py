"""Wasserstein distances of densities from known spectra, plain and reweighted, and their bounds.

    python -m bench.densities [--seeds 200]

Twelve spectra of n = 1,000. For each, the median distance of the quadrature's weights and of the
masses, in units of the range of the spectrum, and how often `Density.distance` covers it. Tables go
to bench/results/densities.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

import hessfunc as hf
from bench import coverage
from bench.coverage import LEVELS
from hessfunc.algorithms.results import Density

N = 1000
RUNS = ((40, 1), (40, 4))
RESULTS = Path(__file__).parent / "results" / "densities.md"
HEADER = (
    "| spectrum | steps x probes | plain W1 | reweighted W1 | plain / reweighted "
    "| bound / W1 at 95 % | at 80 % | at 90 % | at 95 % | at 99 % | seeds |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def spectra() -> dict[str, Tensor]:
    """Eigenvalues of twelve matrices, three of them like those of networks."""
    found = coverage.spectra(N)
    outliers, bulk = found["10 outliers and a bulk"].split([10, N - 10])
    generator = torch.Generator().manual_seed(5)
    both_signs = 0.3 * torch.randn(N - 10, dtype=torch.float64, generator=generator)
    return {
        "net: 10 outliers, semi-definite bulk": found["10 outliers and a bulk"],
        "net: 10 outliers, indefinite bulk": torch.cat([outliers, both_signs]),
        "net: 10 outliers, decaying bulk": torch.cat([outliers, found["i^-1"][:-10]]),
        **{name: found[name] for name in ("i^-0.5", "i^-1", "i^-2", "0.9^i", "10 ones, 1e-3")},
        "each outlier twice": torch.cat([outliers, outliers, bulk[10:]]),
        **{name: found[name] for name in ("+-1/i", "linspace(1, 3)", "rank one")},
    }


def distance(density: Density, weights: Tensor, values: Tensor) -> float:
    """Return the Wasserstein distance of a mixture of point masses from the eigenvalues."""
    nodes, mass = density.nodes.flatten().numpy(), weights.flatten().numpy()
    return float(wasserstein_distance(values.numpy(), nodes, None, mass))


def row(name: str, values: Tensor, steps: int, probes: int, seeds: int) -> str:
    """Return the row of a spectrum."""
    plain, masses, bounds = [], [], []
    for seed in range(seeds):
        found = hf.slq(
            lambda block: block * values,
            torch.zeros(N, dtype=torch.float64),
            probes=probes,
            steps=steps,
            seed=seed,
        )
        plain.append(distance(found, found.weights, values))
        masses.append(distance(found, found.masses, values))
        bounds.append([found.distance(level) for level in LEVELS])
    spread = float(values.max() - values.min())
    plain_w1, w1 = torch.tensor(plain), torch.tensor(masses)
    bound = torch.tensor(bounds)
    # Distances of rounding count as covered by bounds of rounding.
    covered = (bound >= w1[:, None] - 1e-14 * spread).double().mean(0).tolist()
    ratio = float((bound[:, 2] / w1).median())
    medians = float(plain_w1.median()) / spread, float(w1.median()) / spread
    shares = " | ".join(f"{100 * share:.1f} %" for share in covered)
    return (
        f"| {name} | {steps} x {probes} | {medians[0]:.1e} | {medians[1]:.1e} "
        f"| {medians[0] / medians[1]:.1f} | {ratio:.1f} | {shares} | {seeds} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Distances of densities from known spectra.")
    parser.add_argument("--seeds", type=int, default=200, help="Number of seeds of each row.")
    seeds = parser.parse_args().seeds
    lines = list(HEADER)
    for name, values in spectra().items():
        for steps, probes in RUNS:
            lines.append(row(name, values, steps, probes, seeds))
            print(lines[-1], flush=True)
            RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
