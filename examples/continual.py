"""Learning of five tasks in turn without forgetting (elastic weight consolidation, EWC).

    python examples/continual.py        # a table, and continual.png

Task t asks whether a digit is 2t or 2t + 1. After a task, the Fisher matrix F_t at the weights
theta_t describes what it needs, and the loss of all later tasks has the penalty

    strength / 2 (theta - theta_t)' F_t (theta - theta_t)

(Kirkpatrick et al. 2017, arXiv 1612.00796, with the diagonal of F_t). With Kronecker factors it
knows of correlations within each layer (Ritter, Botev and Barber 2018, arXiv 1805.07810). The
prediction that ignores the task, 0 for even and 1 for odd digits, is tested on all five.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.algorithms.statistics import student_mean
from hessfunc.app.problems.data import data_root, small_digits
from hessfunc.app.problems.fit import accuracy
from hessfunc.app.problems.nets import mlp
from hessfunc.randomness import seeded
from hessfunc.training.examples import Examples

Params = dict[str, Tensor]

TASKS = 5
STRENGTHS = {"no penalty": 0.0, "diagonal": 10_000.0, "Kronecker": 100.0}


def task(examples: Examples, t: int) -> Examples:
    """Return the digits 2t and 2t + 1, with the labels 0 and 1."""
    chosen = examples.targets // 2 == t
    return Examples(examples.inputs[chosen], examples.targets[chosen] % 2)


def scaled(diagonal: Params, block: Params) -> Params:
    return {name: rows * diagonal[name] for name, rows in block.items()}


def curvature(method: str, loss: hf.Loss, model: nn.Module, examples: Examples) -> hf.Matvec:
    """Return the products with the Fisher matrix of a task, at the weights of the model."""
    weights, batches = weights_of(model), examples.batches(500)
    if method == "diagonal":
        return partial(scaled, hf.ggn_diagonal(loss, weights, batches))
    return hf.over_batches(hf.kronecker.kflr(loss, model))(weights, batches)


def weights_of(model: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def accuracies(
    method: str, strength: float, seen: Examples, test: Examples, seed: int, *, epochs: int
) -> list[float]:
    """Return the mean test accuracy on the tasks so far, after each task."""
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = mlp([seen.inputs[0].numel(), 64, 32, 2])
    loss = hf.supervised(hf.functional(model)[0], cross_entropy)
    found, penalties = [], []
    for t in range(TASKS):
        examples = task(seen, t)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(examples), generator=generator).split(64):
                optimizer.zero_grad()
                cross_entropy(model(examples.inputs[batch]), examples.targets[batch]).backward()
                weights = weights_of(model)
                for F, then in penalties:
                    pulls = hf.apply(F, {n: w - then[n] for n, w in weights.items()})
                    for name, p in model.named_parameters():
                        p.grad += strength * pulls[name]
                optimizer.step()
        if strength:
            penalties.append((curvature(method, loss, model, examples), weights_of(model)))
        found.append(fmean(accuracy(model, task(test, s)) for s in range(t + 1)))
    return found


def main(*, small: bool = False, out: Path = Path("continual.png")) -> dict[str, Tensor]:
    """Return the accuracies ``[seeds, tasks]`` after each task, by method."""
    seen, test = small_digits(6000, None if small else data_root())
    epochs, count = (20, 2) if small else (10, 5)
    print(f"mean test accuracy on the tasks so far, with 95 % intervals over {count} seeds")
    found = {}
    for method, strength in STRENGTHS.items():
        # The strengths were chosen with the seeds 0 and 1.
        every = [
            accuracies(method, strength, seen, test, seed, epochs=epochs)
            for seed in range(2, 2 + count)
        ]
        found[method] = torch.tensor(every).double()
        rows = zip(*student_mean(found[method]), strict=True)
        print(f"{method:12}" + "".join(f"{m:8.1%} ± {r:5.1%}" for m, r in rows))
    draw(found, out)
    return found


def draw(found: dict[str, Tensor], out: Path) -> None:
    from hessfunc.plot.style import PALETTE, clean, legend, new_axes

    ax, tasks = clean(new_axes()), range(1, TASKS + 1)
    for i, ((method, rows), colour) in enumerate(zip(found.items(), PALETTE, strict=False)):
        # Side by side, so that no bar hides another one.
        places = [task + 0.05 * (i - 1) for task in tasks]
        ax.errorbar(places, *student_mean(rows), color=colour, label=method, capsize=2)
    ax.set(xlabel="tasks so far", ylabel="mean test accuracy on them", xticks=tasks)
    legend(ax)
    ax.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("continual.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
