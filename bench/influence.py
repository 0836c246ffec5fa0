"""Linear datamodelling score of influence, against training again on half subsets.

    python -m bench.influence [--subsets 48] [--seeds 4] [--queries 100]

A perceptron is trained on 500 digits (MNIST at 14 x 14 pixels from HESSFUNC_DATA, or the digits of
scikit-learn), and again on random halves of them. The score of a method is Spearman's correlation,
over the halves, of the loss of a query with the prediction -sum_j S[i, j] over the half, averaged
over the queries (Park et al. 2023, arXiv 2303.14186). The damping is chosen on half of the subsets,
and the score is measured on the others. Intervals are 95 % of 2,000 bootstrap draws of queries and
subsets. The table goes to bench/results/influence.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import hessfunc as hf
from bench.markdown import table
from hessfunc.app.problems.data import digits, mnist
from hessfunc.transforms.example_gradients import example_gradients
from hessfunc.trees import Tree

RESULTS = Path(__file__).parent / "results" / "influence.md"
EXAMPLES, WIDTH, PENALTY = 500, 16, 1e-3
STEPS, RATE, MOMENTUM = 500, 0.1, 0.9
DAMPINGS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DRAWS = 2000
Batch: TypeAlias = tuple[Tensor, Tensor]
Params: TypeAlias = dict[str, Tensor]
# Method and damping; None for methods without damping.
Key: TypeAlias = tuple[str, float | None]


def data(queries: int) -> tuple[str, Batch, Batch]:
    """Return the name of the data set, the training digits, and the queries."""
    try:
        train, test = mnist(), mnist(split="test")
        name = "MNIST, 14 x 14 pixels"
        train_x, test_x = (
            avg_pool2d(part[:EXAMPLES].inputs, 2).flatten(1) for part in (train, test)
        )
        targets = train[:EXAMPLES].targets, test[:queries].targets
    except (ValueError, FileNotFoundError):
        every, name = digits(), "digits of scikit-learn, 8 x 8 pixels"
        train_x = every.inputs[:EXAMPLES].flatten(1)
        test_x = every.inputs[EXAMPLES:].flatten(1)
        targets = every.targets[:EXAMPLES], every.targets[EXAMPLES:][:queries]
    return name, (train_x.float(), targets[0]), (test_x[:queries].float(), targets[1])


def net(inputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))


def trained(
    model_fn: Callable[..., Tensor],
    start: Params,
    batch: Batch,
    masks: Tensor,
    *,
    steps: int = STEPS,
) -> Params:
    """Train copies of a net by gradient descent, each on the digits of one row of ``masks``."""
    inputs, targets = batch

    def objective(params: Params, mask: Tensor) -> Tensor:
        each = cross_entropy(model_fn(params, inputs), targets, reduction="none")
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        return (each * mask).sum() / mask.sum() + PENALTY / 2 * squares

    gradient = torch.func.vmap(torch.func.grad(objective))
    params = {name: p.expand(len(masks), *p.shape).clone() for name, p in start.items()}
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    for _ in range(steps):
        for name, slope in gradient(params, masks).items():
            velocity[name].mul_(MOMENTUM).add_(slope)
            params[name] -= RATE * velocity[name]
    return params


def losses(model_fn: Callable[..., Tensor], params: Params, batch: Batch) -> Tensor:
    """Return the loss of each query for each copy of the net, ``(copies, queries)``."""
    inputs, targets = batch
    of_one = lambda p: cross_entropy(model_fn(p, inputs), targets, reduction="none")  # noqa: E731
    return torch.func.vmap(of_one)(params)


def similarities(loss: hf.Loss, params: Params, train: Batch, queries: Batch) -> list[Tensor]:
    """Return the inner products and the cosines of the gradients."""
    left, right = (rows(example_gradients(loss, params, batch)) for batch in (queries, train))
    unit = left / left.norm(dim=1, keepdim=True), right / right.norm(dim=1, keepdim=True)
    return [left @ right.mT, unit[0] @ unit[1].mT]


def rows(blocks: Iterable[Tree]) -> Tensor:
    return torch.cat([torch.cat([leaf.flatten(1) for leaf in b.values()], 1) for b in blocks])


def correlations(predicted: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation over the last axis."""
    ranks = [rankdata(values, axis=-1) for values in (predicted, real)]
    centred = [r - r.mean(-1, keepdims=True) for r in ranks]
    norms = [np.sqrt((c**2).sum(-1)) for c in centred]
    return (centred[0] * centred[1]).sum(-1) / (norms[0] * norms[1])


@dataclass(frozen=True)
class Measured:
    """Scores of all methods, and the losses that they predict.

    Attributes:
        scores: Scores ``(queries, examples)`` of each method and damping, summed over nets.
        losses: Loss of each query after training on each half, ``(queries, subsets)``.
        masks: Examples of each half, ``(subsets, examples)``.
        parameters: Number of parameters of a net.
        matvecs: Number of products of all solves.
        residual: Largest relative residual of all solves.
    """

    scores: dict[Key, Tensor]
    losses: Tensor
    masks: Tensor
    parameters: int
    matvecs: int
    residual: float


def measured(train: Batch, queries: Batch, *, subsets: int, seeds: int) -> Measured:
    """Train on all examples and on random halves, and compute the scores of all methods."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(subsets, EXAMPLES, generator=generator).argsort(1)
    masks = torch.zeros(subsets, EXAMPLES).scatter_(1, order[:, : EXAMPLES // 2], 1.0)
    scores: dict[Key, Tensor] = {}
    real, matvecs, residual, parameters = torch.zeros(subsets, len(queries[1])), 0, 0.0, 0

    def add(method: str, damping: float | None, more: Tensor) -> None:
        scores[method, damping] = scores.get((method, damping), 0.0) + more.float()

    for seed in range(seeds):
        model = net(train[0].shape[1], seed)
        model_fn, start = hf.functional(model)
        loss = hf.supervised(model_fn, cross_entropy)
        real += losses(model_fn, trained(model_fn, start, train, masks), queries) / seeds
        of_all = trained(model_fn, start, train, torch.ones(1, EXAMPLES))
        params = {name: p[0] for name, p in of_all.items()}
        parameters = sum(p.numel() for p in params.values())
        product, cosine = similarities(loss, params, train, queries)
        add("gradient product", None, product)
        add("gradient cosine", None, cosine)
        factors = hf.over_batches(hf.kronecker.ekfac(loss, model))(params, [train])
        matvec = hf.over_batches(hf.ggnvp(loss), keep=True)(params, [train])
        for damping in DAMPINGS:
            influence = partial(hf.influence, loss, params, [train], [queries], damping=damping)
            add("EKFAC", damping, influence(curvature=factors).scores)
            inverse = factors.inverse(damping)
            exact = influence(curvature=matvec, preconditioner=inverse, rtol=1e-3)
            if not exact.converged:
                raise RuntimeError(f"damping {damping:g}: {exact.reason}")
            matvecs += exact.matvecs
            residual = max(residual, float(exact.relative_residuals.max()))
            add("exact GGN", damping, exact.scores)
    return Measured(scores, real.mT, masks, parameters, matvecs, residual)


def tables(found: Measured, *, draws: int = DRAWS) -> tuple[str, str]:
    """Return the table of all methods, and the table of all dampings."""
    queries, subsets = found.losses.shape
    # More weight on the examples of the half lowers the loss by the sum of their scores.
    predicted = {key: -(s @ found.masks.mT).numpy() for key, s in found.scores.items()}
    actual = found.losses.numpy()
    half = subsets // 2

    def score(key: Key, part: slice) -> float:
        return float(correlations(predicted[key][:, part], actual[:, part]).mean())

    best: dict[str, Key] = {
        method: max((k for k in predicted if k[0] == method), key=lambda k: score(k, slice(half)))
        for method in ("exact GGN", "EKFAC", "gradient product", "gradient cosine")
    }
    random = np.random.default_rng(0)
    picks = [
        np.ix_(random.integers(queries, size=queries), random.integers(half, subsets, size=half))
        for _ in range(draws)
    ]
    resampled = {
        method: np.array([correlations(predicted[key][i], actual[i]).mean() for i in picks])
        for method, key in best.items()
    }
    rows = [["method", "damping", "LDS", "95 % interval", "exact GGN minus the method"]]
    for method, key in best.items():
        damping = "" if key[1] is None else f"{key[1]:g}"
        measured_score = f"{score(key, slice(half, subsets)):.3f}"
        gap = interval(resampled["exact GGN"] - resampled[method]) if method != "exact GGN" else ""
        rows.append([method, damping, measured_score, interval(resampled[method]), gap])
    by_damping = [["method", *(f"{d:g}" for d in DAMPINGS)]]
    for method in ("exact GGN", "EKFAC"):
        every = (f"{score((method, d), slice(subsets)):.3f}" for d in DAMPINGS)
        by_damping.append([method, *every])
    return table(rows), table(by_damping)


def interval(draws: np.ndarray) -> str:
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"[{low:.3f}, {high:.3f}]"


def main(*, subsets: int = 48, seeds: int = 4, queries: int = 100, out: Path = RESULTS) -> None:
    started = time.process_time()
    name, train, held_out = data(queries)
    found = measured(train, held_out, subsets=subsets, seeds=seeds)
    methods, dampings = tables(found)
    average = found.matvecs / (seeds * len(DAMPINGS) * queries)
    minutes = (time.process_time() - started) / 60
    text = f"""# Linear datamodelling score of influence

{name}; {EXAMPLES} examples, a perceptron with {found.parameters:,} parameters, {queries} queries.
{subsets} halves of the data are trained with {seeds} seeds each. Scores are means over {seeds} nets
of all data. The damping is chosen on {subsets // 2} halves, and the score is measured on the
others. Intervals are from {DRAWS:,} bootstrap draws of queries and halves.

## Methods

{methods}

## Dampings

The score on all halves, by damping:

{dampings}

EKFAC-preconditioned conjugate gradients take {average:.1f} products for a query, on average over
the dampings, to a relative residual of at most {found.residual:.1e}. The run takes {minutes:.1f}
minutes of processor time.
"""
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subsets", type=int, default=48, help="Number of random halves.")
    parser.add_argument("--seeds", type=int, default=4, help="Number of nets for each half.")
    parser.add_argument("--queries", type=int, default=100, help="Number of queries.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="File of the table.")
    main(**vars(parser.parse_args()))
