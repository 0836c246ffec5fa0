"""Laplace approximations of a network for scikit-learn's digits, in each structure.

    python -m bench.laplace [--seeds 6]

Each seed draws 500 training digits, and trains a network 64-16-10 with a prior precision of 1 to
the minimum of its loss by L-BFGS. The other 1,297 digits test the trained network and the
posteriors, at this prior precision and at the tuned one. The means with their 95 % intervals over
seeds go to bench/results/laplace.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hessfunc as hf
from bench.markdown import table
from hessfunc.algorithms.statistics import student_mean
from hessfunc.app.problems.data import digits

RESULTS = Path(__file__).parent / "results" / "laplace.md"
TRAIN, PRIOR = 500, 1.0
STRUCTURES: dict[str, dict[str, Any]] = {
    "full": {"structure": "full"},
    "Kronecker": {"structure": "kronecker"},
    "EKFAC": {"structure": "ekfac"},
    "diagonal": {"structure": "diagonal"},
    "50 eigenpairs": {"structure": "low_rank", "rank": 50},
    "200 eigenpairs": {"structure": "low_rank", "rank": 200},
    "last layer, full": {"structure": "full"},
}
Row = tuple[float | None, float, float, float]


def trained(inputs: Tensor, targets: Tensor, seed: int) -> nn.Module:
    """Train a network to the maximum of its posterior."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(leaf.square().sum() for leaf in model.parameters())
        value = nn.functional.cross_entropy(model(inputs), targets) + PRIOR / 2 / TRAIN * penalty
        value.backward()
        return value

    optimizer.step(loss)
    return model


def rows(seed: int) -> Iterator[tuple[str, str, Row]]:
    """Yield the structure, the prior and the row of each measurement of a seed."""
    data = digits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    inputs, targets = data.inputs.flatten(1).double()[order], data.targets[order]
    model = trained(inputs[:TRAIN], targets[:TRAIN], seed)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    batches, test = [(inputs[:TRAIN], targets[:TRAIN])], inputs[TRAIN:]

    def calibrated(probabilities: Tensor) -> tuple[float, float, float]:
        found = hf.calibration(probabilities, targets[TRAIN:])
        return found.nll, found.ece, found.accuracy

    yield "trained network", "1", (None, *calibrated(model_fn(params, test).softmax(1).detach()))
    last, rest = hf.split(params, "2.*")
    for name, options in STRUCTURES.items():
        is_last = name.startswith("last")
        of, chosen = (hf.hold(loss, rest), last) if is_last else (loss, params)
        given = {"model": model} if name in ("Kronecker", "EKFAC") else {}
        posterior = hf.laplace(
            of, chosen, batches, prior_precision=PRIOR, seed=0, **options, **given
        )
        for prior, found in (("1", posterior), ("tuned", posterior.tuned())):
            predictive = found.predictive(of.outputs, (test, None))
            yield (
                name,
                prior,
                (float(found.logdet()) / 2, *calibrated(predictive.probabilities())),
            )


def interval(values: list[float], digits: int) -> str:
    """Return the mean of several seeds with the half-width of its 95 % interval."""
    mean, radius = student_mean(torch.tensor(values, dtype=torch.float64))
    return f"{float(mean):.{digits}f} ± {float(radius):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    seeds = parser.parse_args().seeds
    measured: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for seed in range(seeds):
        for name, prior, row in rows(seed):
            measured[name, prior].append(row)
    lines = [["posterior", "prior precision", "half log det", "NLL", "ECE", "accuracy"]]
    for (name, prior), each in measured.items():
        halves, *others = zip(*each, strict=True)
        half = "" if halves[0] is None else interval(list(halves), 1)
        nll, ece, accuracy = others
        lines.append(
            [
                name,
                prior,
                half,
                interval(list(nll), 4),
                interval(list(ece), 4),
                interval(list(accuracy), 4),
            ]
        )
    text = table(lines)
    RESULTS.write_text(f"{text}\n\n{seeds} seeds; means with 95 % intervals over seeds.\n")
    print(text)


if __name__ == "__main__":
    main()
