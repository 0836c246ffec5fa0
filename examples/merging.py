"""Merging of two models that were trained on different classes (Fisher merging).

    python examples/merging.py          # a table, and merging.png

A model is trained on few digits of all classes. One copy is trained further on the classes 0 to 4,
another one on 5 to 9. If the posterior of each copy is N(theta_i, F_i^-1), the best common model is

    theta = (sum_i F_i)^-1 sum_i F_i theta_i

(Matena and Raffel 2021, arXiv 2111.09832). They take the diagonal of the Fisher matrix F, which
`ggn_diagonal` computes exactly. With Kronecker factors or with the Gauss-Newton matrix of the data
itself, conjugate gradients solve the same equation, from the mean of the models on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.algorithms.statistics import student_mean
from hessfunc.app.problems.data import data_root, small_digits
from hessfunc.app.problems.fit import accuracy, train
from hessfunc.app.problems.nets import mlp
from hessfunc.training.examples import Examples

Params = dict[str, Tensor]

METHODS = ("first copy", "second copy", "mean", "diagonal", "Kronecker", "Gauss-Newton")
DAMPING = 1e-2


def of_classes(examples: Examples, low: int, high: int) -> Examples:
    chosen = (low <= examples.targets) & (examples.targets < high)
    return Examples(examples.inputs[chosen], examples.targets[chosen])


def scaled(diagonal: Params, block: Params) -> Params:
    return {name: rows * diagonal[name] for name, rows in block.items()}


def curvature(
    method: str, loss: hf.Loss, model: nn.Module, weights: Params, examples: Examples
) -> hf.Matvec:
    """Return the products with the curvature of a copy on its own examples."""
    batches = examples.batches(500)
    if method == "diagonal":
        return partial(scaled, hf.ggn_diagonal(loss, weights, batches))
    if method == "Kronecker":
        return hf.over_batches(hf.kronecker.kflr(loss, model))(weights, batches)
    return hf.over_batches(hf.ggnvp(loss))(weights, batches)


def merged(copies: list[Params], curvatures: list[hf.Matvec], rtol: float = 1e-3) -> Params:
    """Return the weights in the middle of copies, as their curvatures measure distances."""
    mean = average(copies)
    # With d = theta - mean, (sum_i F_i) d = sum_i F_i (theta_i - mean).
    right = average(
        [
            hf.apply(F, {n: w - mean[n] for n, w in weights.items()})
            for F, weights in zip(curvatures, copies, strict=True)
        ]
    )
    middle = hf.matvecs.scale(hf.matvecs.add(*curvatures), 1 / len(copies))
    step = hf.cg(middle, right, damping=DAMPING, rtol=rtol).x
    return {n: mean[n] + step[n] for n in mean}


def average(trees: list[Params]) -> Params:
    return {name: torch.stack([tree[name] for tree in trees]).mean(0) for name in trees[0]}


def accuracies(
    seen: Examples, test: Examples, seed: int, epochs: tuple[int, int]
) -> Iterator[float]:
    """Yield the test accuracy of both copies, of their mean, and of each merged model."""
    widths = [seen.inputs[0].numel(), 64, 32, 10]
    model = train(lambda: mlp(widths), seen[: len(seen) // 10], epochs=epochs[0], seed=seed)
    loss = hf.supervised(hf.functional(model)[0], cross_entropy)
    data = [of_classes(seen, 0, 5), of_classes(seen, 5, 10)]
    copies = []
    for part in data:
        copy = train(lambda: deepcopy(model), part, epochs=epochs[1], lr=0.02, seed=seed)
        copies.append(hf.functional(copy)[1])
    found = [*copies, average(copies)]
    for method in METHODS[3:]:
        parts = zip(copies, data, strict=True)
        found.append(merged(copies, [curvature(method, loss, model, *part) for part in parts]))
    for weights in found:
        model.load_state_dict(weights)
        yield accuracy(model, test)


def main(*, small: bool = False, out: Path = Path("merging.png")) -> dict[str, Tensor]:
    """Return the test accuracies ``[seeds]`` by model."""
    seen, test = small_digits(4000, None if small else data_root())
    count, epochs = (2, (100, 10)) if small else (8, (10, 3))
    # The damping was chosen with the seeds 0 and 1.
    every = [list(accuracies(seen, test, seed, epochs)) for seed in range(2, 2 + count)]
    found = dict(zip(METHODS, torch.tensor(every).double().mT, strict=True))
    print(f"test accuracy, and gain over the mean, with 95 % intervals over {count} seeds")
    for method, each in found.items():
        (value, radius), (gain, error) = map(student_mean, (each, each - found["mean"]))
        print(f"{method:14}{value:8.1%} ± {radius:5.1%}{gain:10.1%} ± {error:5.1%}")
    draw(found, out)
    return found


def draw(found: dict[str, Tensor], out: Path) -> None:
    from hessfunc.plot.style import FIRST, clean, new_axes

    ax = clean(new_axes((5.4, 2.8)))
    for place, each in enumerate(reversed(found.values())):
        value, radius = student_mean(each)
        ax.errorbar(value, place, xerr=radius, fmt="o", color=FIRST, capsize=2)
    ax.set(xlabel="test accuracy", yticks=range(len(found)), yticklabels=list(found)[::-1])
    ax.figure.savefig(out, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("merging.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
