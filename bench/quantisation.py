"""Quantisation of a trained Llama: bits of layers by traces, and rounding with Kronecker factors.

    HESSFUNC_DATA=... python -m bench.quantisation [--matvecs 30]

The model is stories260K, whose 35 weight matrices are rounded. Traces and Kronecker factors are
from all stories but one, on which the Kullback-Leibler divergence to the original model is
measured. Every story has its turn. The table goes to bench/results/quantisation.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import TypeAlias

import torch

import hessfunc as hf
from bench.markdown import table
from examples.quantisation import best, sensitivities
from examples.rounding import METHODS, divergence, problem, quantised, to_grid
from hessfunc.algorithms.statistics import student_mean
from hessfunc.app.problems.data import data_root

RESULTS = Path(__file__).parent / "results" / "quantisation.md"
MEAN_BITS = (3, 4)
ALLOCATIONS = ("uniform", "by traces")
# Divergences by mean bits, allocation and method.
Measured: TypeAlias = dict[tuple[int, str, str], list[float]]


def measured(matvecs: int, *, folds: int | None = None) -> tuple[Measured, list[float]]:
    """Return the divergences of each setting over stories, and the relative errors of traces.

    Args:
        matvecs: Number of products for the traces.
        folds: Number of stories that have their turn, None for all.
    """
    model, loss, weights, stories = problem()
    factors = hf.over_batches(hf.kronecker.kfac(loss, model, samples=4, seed=0))
    sizes = [w.numel() for w in weights.values()]
    found: Measured = defaultdict(list)
    errors = []
    for i, held_out in enumerate(stories[:folds]):
        seen = [*stories[:i], *stories[i + 1 :]]
        matvec = hf.over_batches(hf.ggnvp(loss))(weights, seen)
        traces = hf.hutchinson(matvec, weights, max_matvecs=matvecs, seed=i).by_leaf
        for trace in traces.values():
            low, high = trace.interval()
            errors.append((high - low) / 2 / trace)
        costs = [
            sensitivities(w, traces[n], lambda x, b: to_grid(x, b)(x.mT, slice(None)).mT)
            for n, w in weights.items()
        ]
        blocks = factors(weights, seen)
        for mean, allocation, method in product(MEAN_BITS, ALLOCATIONS, METHODS):
            uniform = allocation == "uniform"
            bits = (mean,) * len(sizes) if uniform else best(sizes, costs, mean)
            changed = {
                n: quantised(w, blocks[n], b, method)
                for (n, w), b in zip(weights.items(), bits, strict=True)
            }
            key = mean, allocation, method
            found[key].append(divergence(loss, weights, changed, held_out))
    return found, errors


def rows(found: Measured) -> list[list[str]]:
    """Return the rows of the table: divergences, and their ratio to rounding to the nearest."""
    lines = [
        ["bits per weight", "bits of layers", "rounding", "KL, nats per token", "KL / nearest"]
    ]
    for (mean, allocation, method), values in found.items():
        logs = torch.tensor(values).log() - torch.tensor(found[mean, "uniform", "nearest"]).log()
        centre, width = student_mean(logs)
        low, middle, high = (centre + s * width for s in (-1, 0, 1))
        value, radius = student_mean(torch.tensor(values))
        ratio = f"{middle.exp():.2f} [{low.exp():.2f}, {high.exp():.2f}]"
        first = (allocation, method) == ("uniform", "nearest")
        cells = f"{value:.4f} ± {radius:.4f}", "" if first else ratio
        lines.append([str(mean), allocation, method, *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matvecs", type=int, default=30, help="Products for the traces.")
    matvecs = parser.parse_args().matvecs
    if data_root() is None:
        parser.error("set HESSFUNC_DATA to a folder that contains stories260K")
    found, errors = measured(matvecs)
    stories = len(next(iter(found.values())))
    text = f"""# Quantisation of stories260K

{table(rows(found))}

Each row of a weight matrix has 2^bits even steps between its extremes. The embedding and the norms
are not rounded. Means and 95 % intervals are over {stories} stories, and the ratio is the geometric
mean of ratios of the same story. {matvecs} products give the traces of all 35 matrices, whose 95 %
intervals have half-widths from {min(errors):.1%} to {max(errors):.1%} of the trace.
"""
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
