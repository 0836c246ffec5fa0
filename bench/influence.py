"""Linear datamodelling score of influence, against training again on half subsets.

    python -m bench.influence [--problems mnist digits shakespeare] [--subsets 32] [--seeds 2]

A net is trained on a few hundred examples, and again on random halves of them. The score of a
method is Spearman's correlation, over the halves, of the loss of a query with the prediction
-sum_j S[i, j] over the half, averaged over the queries (Park et al. 2023, arXiv 2303.14186). The
damping is chosen on half of the subsets, and the score is measured on the others. Intervals are
95 % of 2,000 bootstrap draws of queries and subsets. MNIST and tinyshakespeare are read from
HESSFUNC_DATA. The table goes to bench/results/influence.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import hessfunc as hf
from bench.markdown import table
from hessfunc.app.problems.data import data_root, digits, mnist
from hessfunc.app.problems.gpt import GPT
from hessfunc.app.problems.nets import digits_convnet, mlp
from hessfunc.transforms.example_gradients import example_gradients
from hessfunc.trees import Tree

RESULTS = Path(__file__).parent / "results" / "influence.md"
PENALTY = 1e-3
METHODS = ("exact GGN", "EKFAC", "gradient product", "gradient cosine")
DRAWS = 2000
Batch: TypeAlias = tuple[Tensor, Tensor]
Params: TypeAlias = dict[str, Tensor]
# Method and damping; None for methods without damping.
Key: TypeAlias = tuple[str, float | None]


@dataclass(frozen=True)
class Problem:
    """Net with its training examples and queries.

    Attributes:
        title: Data and net, in words.
        make: Function that makes the net.
        train: Training examples.
        queries: Queries.
        optimizer: Optimiser of the parameters.
        steps: Number of steps, each on all examples.
        dampings: Dampings of both methods that have one.
        rtol: Tolerance of the exact solves.
        samples: Number of draws of each target for EKFAC. None computes exact output factors.
    """

    title: str
    make: Callable[[], nn.Module]
    train: Batch
    queries: Batch
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    steps: int
    dampings: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    rtol: float = 1e-3
    samples: int | None = None


def of_mnist(examples: int = 500, queries: int = 100) -> Problem:
    parts = mnist()[:examples], mnist(split="test")[:queries]
    train, test = ((avg_pool2d(p.inputs, 2).flatten(1).float(), p.targets) for p in parts)
    return Problem(
        f"MNIST at 14 x 14 pixels, {examples} digits, a perceptron",
        partial(mlp, [train[0].shape[1], 16, 10], nn.Tanh),
        train,
        test,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        500,
    )


def of_digits(examples: int = 400, queries: int = 30) -> Problem:
    every = digits()
    parts = every[:examples], every[examples : examples + queries]
    train, test = ((part.inputs.float(), part.targets) for part in parts)
    return Problem(
        f"scikit-learn's digits, {examples} of them, two convolutions and a linear head",
        digits_convnet,
        train,
        test,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        200,
        (3e-3, 1e-2, 3e-2, 1e-1),
        1e-2,
    )


def of_shakespeare(examples: int = 64, queries: int = 16, length: int = 32) -> Problem:
    root = data_root()
    if root is None:
        raise FileNotFoundError("tinyshakespeare: set HESSFUNC_DATA to the folder of data sets")
    text = (root / "tinyshakespeare" / "input.txt").read_text()
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    size = length + 1
    rows = torch.tensor([index[c] for c in text[: (examples + queries) * size]]).view(-1, size)
    batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return Problem(
        f"tinyshakespeare, {examples} sequences of {length} characters, a GPT of two layers",
        partial(GPT, len(index), length, width=32, layers=2, heads=2, tied=False),
        (batch[0][:examples], batch[1][:examples]),
        (batch[0][examples:], batch[1][examples:]),
        partial(torch.optim.Adam, lr=3e-3),
        100,
        (1e-2, 3e-2, 1e-1, 3e-1),
        1e-2,
        samples=8,
    )


PROBLEMS = {"mnist": of_mnist, "digits": of_digits, "shakespeare": of_shakespeare}


def functional(model: nn.Module) -> tuple[Callable[..., Tensor], Params]:
    """Return the model with the classes along the axis 1, and its parameters."""
    model_fn, params = hf.functional(model)
    return lambda params, inputs: model_fn(params, inputs).movedim(-1, 1), params


def trained(
    model_fn: Callable[..., Tensor], start: Params, problem: Problem, chosen: Tensor
) -> Params:
    """Train copies of a net, each on the examples of one row of ``chosen``, ``(copies, m)``."""
    inputs, targets = (part[chosen] for part in problem.train)

    def objective(params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        return cross_entropy(model_fn(params, inputs), targets) + PENALTY / 2 * squares

    params = {name: p.expand(len(chosen), *p.shape).clone() for name, p in start.items()}
    # An optimiser acts on each number alone, so that it trains each copy by itself.
    optimizer = problem.optimizer(list(params.values()))
    for _ in range(problem.steps):
        slopes = torch.func.vmap(torch.func.grad(objective))(params, inputs, targets)
        for name, leaf in params.items():
            leaf.grad = slopes[name]
        optimizer.step()
    return params


def losses(model_fn: Callable[..., Tensor], params: Params, batch: Batch) -> Tensor:
    """Return the loss of each query for each copy of the net, ``(copies, queries)``."""
    inputs, targets = batch

    def of_copy(params: Params) -> Tensor:
        each = cross_entropy(model_fn(params, inputs), targets, reduction="none")
        return each.reshape(len(each), -1).mean(1)

    return torch.func.vmap(of_copy)(params)


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
        matvecs: Number of products for a query, on average over nets and dampings.
        residual: Largest relative residual of all solves.
    """

    scores: dict[Key, Tensor]
    losses: Tensor
    masks: Tensor
    parameters: int
    matvecs: float
    residual: float


def measured(problem: Problem, *, subsets: int, seeds: int) -> Measured:
    """Train on all examples and on random halves, and compute the scores of all methods."""
    examples, queries = len(problem.train[0]), problem.queries
    generator = torch.Generator().manual_seed(0)
    halves = torch.rand(subsets, examples, generator=generator).argsort(1)[:, : examples // 2]
    masks = torch.zeros(subsets, examples).scatter_(1, halves, 1.0)
    scores: dict[Key, Tensor] = {}
    real, matvecs, residual, parameters = torch.zeros(subsets, len(queries[1])), 0, 0.0, 0

    def add(method: str, damping: float | None, more: Tensor) -> None:
        scores[method, damping] = scores.get((method, damping), 0.0) + more.float()

    for seed in range(seeds):
        torch.manual_seed(seed)
        model = problem.make()
        model_fn, start = functional(model)
        loss = hf.supervised(model_fn, cross_entropy)
        real += losses(model_fn, trained(model_fn, start, problem, halves), queries) / seeds
        of_all = trained(model_fn, start, problem, torch.arange(examples)[None])
        params = {name: p[0] for name, p in of_all.items()}
        parameters = sum(p.numel() for p in params.values())
        product, cosine = similarities(loss, params, problem.train, queries)
        add("gradient product", None, product)
        add("gradient cosine", None, cosine)
        train: list[Any] = [problem.train]
        ekfac = hf.kronecker.ekfac(loss, model, samples=problem.samples, seed=seed)
        factors = hf.over_batches(ekfac)(params, train)
        matvec = hf.over_batches(hf.ggnvp(loss), keep=True)(params, train)
        for damping in problem.dampings:
            influence = partial(hf.influence, loss, params, train, [queries], damping=damping)
            add("EKFAC", damping, influence(curvature=factors).scores)
            inverse = factors.inverse(damping)
            exact = influence(curvature=matvec, preconditioner=inverse, rtol=problem.rtol)
            if not exact.converged:
                raise RuntimeError(f"damping {damping:g}: {exact.reason}")
            matvecs += exact.matvecs
            residual = max(residual, float(exact.relative_residuals.max()))
            add("exact GGN", damping, exact.scores)
    average = matvecs / (seeds * len(problem.dampings) * len(queries[1]))
    return Measured(scores, real.mT, masks, parameters, average, residual)


def tables(every: Mapping[str, Measured], *, draws: int = DRAWS) -> tuple[str, str]:
    """Return the table of all methods, and the table of all dampings."""
    rows = [["problem", "method", "damping", "LDS", "95 % interval", "exact GGN minus the method"]]
    by_damping = [["problem", "method", "score by damping"]]
    for name, found in every.items():
        methods, dampings = _rows(found, draws)
        rows += [[name, *row] for row in methods]
        by_damping += [[name, *row] for row in dampings]
    return table(rows), table(by_damping)


def _rows(found: Measured, draws: int) -> tuple[list[list[str]], list[list[str]]]:
    queries, subsets = found.losses.shape
    # More weight on the examples of the half lowers the loss by the sum of their scores.
    predicted = {key: -(s @ found.masks.mT).numpy() for key, s in found.scores.items()}
    actual = found.losses.numpy()
    half = subsets // 2

    def score(key: Key, part: slice) -> float:
        return float(correlations(predicted[key][:, part], actual[:, part]).mean())

    keys = {method: [key for key in predicted if key[0] == method] for method in METHODS}
    best = {m: max(own, key=lambda key: score(key, slice(half))) for m, own in keys.items()}
    random = np.random.default_rng(0)
    picks = [
        np.ix_(random.integers(queries, size=queries), random.integers(half, subsets, size=half))
        for _ in range(draws)
    ]
    resampled = {
        method: np.array([np.nanmean(correlations(predicted[key][i], actual[i])) for i in picks])
        for method, key in best.items()
    }
    rows = []
    for method, key in best.items():
        damping = "" if key[1] is None else f"{key[1]:g}"
        measured_score = f"{score(key, slice(half, subsets)):.3f}"
        gap = interval(resampled["exact GGN"] - resampled[method]) if method != "exact GGN" else ""
        rows.append([method, damping, measured_score, interval(resampled[method]), gap])
    by_damping = []
    for method in METHODS[:2]:
        every = (f"{d:g}: {score((method, d), slice(subsets)):.3f}" for _, d in keys[method])
        by_damping.append([method, ", ".join(every)])
    return rows, by_damping


def interval(draws: np.ndarray) -> str:
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"[{low:.3f}, {high:.3f}]"


def main(*, problems: list[str], subsets: int, seeds: int, out: Path = RESULTS) -> None:
    found, sentences = {}, []
    for name in problems:
        started, problem = time.process_time(), PROBLEMS[name]()
        found[name] = one = measured(problem, subsets=subsets, seeds=seeds)
        minutes = (time.process_time() - started) / 60
        sentences.append(
            f"- {name}: {problem.title} with {one.parameters:,} parameters, {one.losses.shape[0]} "
            f"queries; {subsets} halves, {seeds} seeds. EKFAC-preconditioned conjugate gradients "
            f"take {one.matvecs:.1f} products for a query, to a relative residual of at most "
            f"{one.residual:.1e}. The run takes {minutes:.1f} minutes of processor time."
        )
        print(sentences[-1], *tables({name: one}), sep="\n", flush=True)
    methods, dampings = tables(found)
    listed = "\n".join(sentences)
    text = f"""# Linear datamodelling score of influence

Random halves of the data are trained with several seeds each. Scores are means over nets of all
data, one for each seed. The damping is chosen on one half of the halves, and the score is measured
on the others. Intervals are from {DRAWS:,} bootstrap draws of queries and halves.

{listed}

## Methods

{methods}

## Dampings

The score on all halves, by damping:

{dampings}
"""
    out.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--subsets", type=int, default=32, help="Number of random halves.")
    parser.add_argument("--seeds", type=int, default=2, help="Number of nets for each half.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="File of the table.")
    main(**vars(parser.parse_args()))
