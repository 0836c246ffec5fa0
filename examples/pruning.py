"""Pruning by optimal brain surgeon and optimal brain damage, against magnitude.

    python examples/pruning.py          # a table, and pruning.png

At a minimum with curvature F, pruning the weight w_q raises the loss least if all others move by
-w_q F^-1 e_q / [F^-1]_qq, which costs w_q^2 / (2 [F^-1]_qq) (Hassibi and Stork 1992, Optimal brain
surgeon). Optimal brain damage (LeCun, Denker and Solla 1990) has a diagonal F: no weight moves, and
the cost is F_qq w_q^2 / 2. Here the surgeon's F is the Gauss-Newton matrix in Kronecker factors,
plus the weight decay. The weights with the least costs are pruned in stages, without training
between them. After each stage, the surgeon's kept weights move to the minimum of the quadratic
model for all pruned weights together, which conjugate gradients find.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.algorithms.statistics import student_mean
from hessfunc.app.problems.data import data_root, small_digits
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.nets import mlp
from hessfunc.kronecker import Eigenbasis, Kronecker
from hessfunc.training.examples import Examples

Params = dict[str, Tensor]

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
METHODS = ("surgeon", "damage", "magnitude")
DECAY = 1e-4


def inverse_diagonal(block: Kronecker) -> Tensor:
    """Return the diagonal of (B (x) A + decay I)^-1, from the eigenvectors of both factors."""
    (b, left), (a, right) = torch.linalg.eigh(block.left), torch.linalg.eigh(block.right)
    values = 1 / (b[:, :, None] * a[:, None] + DECAY)
    return Eigenbasis(left, right, values, block.shape).diagonal()


def least(costs: Params, sparsity: float) -> Params:
    """Return masks of the weights that are kept: zero at this share with the least costs."""
    order = hf.ravel(costs).argsort()
    keep = torch.ones(len(order), dtype=order.dtype)
    keep[order[: round(sparsity * len(order))]] = 0
    return hf.unravel(keep, costs)


def times(one: Params, other: Params) -> Params:
    return {name: one[name] * other[name] for name in one}


def moved(weights: Params, keep: Params, curvature: Any, rtol: float = 1e-4) -> Params:
    """Set weights to zero, and move the kept ones K: (F + decay I)_KK d = F_KP w for pruned P."""
    pruned = {name: w * (1 - keep[name]) for name, w in weights.items()}
    right = times(keep, hf.apply(curvature, pruned))
    step = hf.cg(
        lambda v: times(curvature(times(v, keep)), keep), right, damping=DECAY, rtol=rtol
    ).x
    return {name: keep[name] * (w + step[name]) for name, w in weights.items()}


def losses(
    examples: Examples, seed: int, stages: Sequence[float], *, epochs: int
) -> list[list[float]]:
    """Return the training loss of a net after each stage, by method."""
    widths = [examples.inputs[0].numel(), 64, 32, 10]
    model = train(lambda: mlp(widths), examples, epochs=epochs, weight_decay=DECAY, seed=seed)
    model_fn, params = hf.functional(model)
    trained, biases = hf.split(params, "*.weight")
    loss = hf.hold(hf.supervised(model_fn, cross_entropy), biases)
    batches = examples.batches(500)

    def value(weights: Params) -> float:
        return float(loss(weights, (examples.inputs, examples.targets)))

    found = []
    for method in METHODS:
        weights, row = trained, [value(trained)]
        for sparsity in stages:
            if method == "surgeon":
                factors = hf.over_batches(hf.kronecker.kflr(loss, model))(weights, batches)
                scale = {n: 1 / inverse_diagonal(factors[n]) for n in weights}
            elif method == "damage":
                scale = hf.ggn_diagonal(loss, weights, batches)
            else:
                scale = {n: torch.ones_like(w) for n, w in weights.items()}
            keep = least({n: scale[n] * w.square() for n, w in weights.items()}, sparsity)
            weights = moved(weights, keep, factors) if method == "surgeon" else times(weights, keep)
            row.append(value(weights))
        found.append(row)
    return found


def main(*, small: bool = False, out: Path = Path("pruning.png")) -> dict[str, Tensor]:
    """Return the losses ``[seeds, stages]`` of each method; the first stage is the trained net."""
    seeds, epochs, stages = (2, 10, SPARSITIES[3::2]) if small else (5, 20, SPARSITIES)
    examples, _ = small_digits(2000, None if small else data_root())
    every = torch.tensor([losses(examples, s, stages, epochs=epochs) for s in range(seeds)])
    print(f"training loss of {seeds} nets, with 95 % intervals over seeds")
    print(f"{'pruned':>6}" + "".join(f"{method:>18}" for method in METHODS))
    mean, radius = student_mean(every.double())
    for i, sparsity in enumerate((0.0, *stages)):
        cells = (f"{mean[m, i]:9.4f} ± {radius[m, i]:6.4f}" for m in range(len(METHODS)))
        print(f"{sparsity:6.0%}" + "".join(cells))
    draw((0.0, *stages), mean, radius, out)
    return {method: every[:, m] for m, method in enumerate(METHODS)}


def draw(stages: Sequence[float], mean: Tensor, radius: Tensor, out: Path) -> None:
    from hessfunc.plot.style import PALETTE, clean, legend, new_axes

    ax = clean(new_axes())
    for name, m, r, colour in zip(METHODS, mean, radius, PALETTE, strict=False):
        ax.errorbar(stages, m, r, color=colour, label=name, capsize=2)
    ax.set(xlabel="share of weights at zero", ylabel="training loss", yscale="log")
    legend(ax)
    ax.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("pruning.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
