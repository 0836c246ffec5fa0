"""Rounding of weights with Kronecker factors (GPTQ, with one factor or both).

    python examples/rounding.py         # a table, and rounding.png

Rounding changes the weights W of a layer by D, and the outputs by a Kullback-Leibler divergence of
about vec(D)' F vec(D) / 2. With the Kronecker factors F = B (x) A of the Fisher matrix this is
tr(B D A D') / 2. GPTQ (Frantar et al. 2022, arXiv 2210.17323) has B = I: it rounds one column after
another, and moves the columns that follow to the minimum of tr(D A D') given the error so far. With
both factors, the entries of a column also compensate for each other (Tseng et al. 2025, arXiv
2505.22988). The factors are from all stories but one, and this one measures the divergence.

The model is stories260K, a trained Llama with five layers, if the folder HESSFUNC_DATA contains it.
Otherwise it is a perceptron for scikit-learn's digits.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import hessfunc as hf
from hessfunc.algorithms.statistics import student_mean
from hessfunc.app.problems.data import data_root, digits
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.llama import stories260k, stories_batches
from hessfunc.app.problems.nets import mlp
from hessfunc.kronecker import Kronecker

Params = dict[str, Tensor]
Rounded = Callable[[Tensor, Any], Tensor]
Found = dict[tuple[int, str], list[float]]

BITS = (3, 4, 5)
METHODS = ("nearest", "factor A", "factors A, B")
DAMPING = 0.01  # As a share of the mean eigenvalue of a factor.


def problem(*, small: bool = False) -> tuple[nn.Module, hf.Loss, Params, list[Any]]:
    """Return a model, its loss, the weights of its layers, and batches; all in float64."""
    root = data_root()
    folder = None if root is None else root / "stories260K"
    if folder is None or not folder.is_dir():
        images = digits()
        model = train(lambda: mlp([64, 32, 32, 10]), images, epochs=20).double()
        model_fn, params = hf.functional(model)
        weights, biases = hf.split(params, "*.weight")
        loss = hf.hold(hf.supervised(model_fn, cross_entropy), biases)
        return model, loss, weights, [(x.double(), t) for x, t in images.batches(360)]
    model = stories260k(folder / "stories260K_torch.npz").double()
    model_fn, params = hf.functional(model)
    weights, rest = hf.split(params, "*layers.4*_proj.weight" if small else "*_proj.weight")

    def logits(params: Any, batch: Any) -> Tensor:
        return model_fn(params, {"input_ids": batch["input_ids"]}).logits[0, :-1]

    loss = hf.composed(logits, cross_entropy, targets=lambda batch: batch["labels"][0, 1:])
    return (
        model,
        hf.hold(loss, rest),
        weights,
        stories_batches(folder / "tinystories_sample_ids.npz"),
    )


def to_grid(weight: Tensor, bits: int) -> Callable[[Tensor, int | slice], Tensor]:
    """Return the function that rounds a column to 2^bits even steps between each row's extremes."""
    low, high = weight.aminmax(dim=1)
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)

    def rounded(column: Tensor, rows: int | slice) -> Tensor:
        levels = ((column - low[rows]) / step[rows]).round().clamp(0, 2**bits - 1)
        return low[rows] + step[rows] * levels

    return rounded


def conditional(factor: Tensor) -> Tensor:
    """Return the rows by which later columns follow an error of column j, ``U[j, j:] / U[j, j]``.

    With A^-1 = U'U, these moves are the minimum of tr(D A D') for a given error of column j.
    """
    damping = DAMPING * factor.diagonal().mean() * torch.eye(len(factor))
    U = torch.linalg.cholesky(torch.linalg.inv(factor + damping), upper=True)
    return U / U.diagonal()[:, None]


def compensated(weight: Tensor, moves: Tensor, rounded: Rounded) -> Tensor:
    """Round the columns of a matrix in turn; later columns compensate for the error so far."""
    weight = weight.clone()
    for j, move in enumerate(moves):
        column = rounded(weight[:, j], j)
        error, weight[:, j] = weight[:, j] - column, column
        weight[:, j + 1 :] -= torch.outer(error, move[j + 1 :])
    return weight


def quantised(weight: Tensor, block: Kronecker, bits: int, method: str) -> Tensor:
    """Return a rounded matrix ``[O, K]``, whose block of the Fisher matrix has factors B and A."""
    grid, every = to_grid(weight, bits), slice(None)
    if method == "nearest":
        return grid(weight.mT, every).mT
    columns, rows = conditional(block.right[0]), conditional(block.left[0])
    if method == "factor A":
        return compensated(weight, columns, lambda column, _: grid(column, every))
    return compensated(weight, columns, lambda x, _: compensated(x[None], rows, grid)[0])


def divergence(loss: hf.Loss, params: Params, changed: Params, batch: Any) -> float:
    """Return KL(p || q) in nats per output, for the model p and the changed model q."""
    with torch.no_grad():
        p, q = (loss.outputs(each, batch).log_softmax(-1) for each in (params, changed))
    return float(kl_div(q, p, log_target=True, reduction="batchmean"))


def main(*, small: bool = False, out: Path = Path("rounding.png")) -> Found:
    """Return the divergence for each number of bits and method, a list over batches."""
    model, loss, weights, batches = problem(small=small)
    curvature = hf.over_batches(hf.kronecker.kfac(loss, model, samples=4, seed=0))
    found: Found = defaultdict(list)
    for i in range(2 if small else len(batches)):
        blocks = curvature(weights, [*batches[:i], *batches[i + 1 :]])
        for bits, method in product(BITS[:1] if small else BITS, METHODS):
            changed = {n: quantised(w, blocks[n], bits, method) for n, w in weights.items()}
            found[bits, method].append(divergence(loss, weights, changed, batches[i]))
    print("KL divergence, and ratio to rounding to nearest, with 95 % intervals over batches")
    for (bits, method), values in found.items():
        mean, radius = student_mean(torch.tensor(values))
        ratios = torch.tensor(values).log() - torch.tensor(found[bits, METHODS[0]]).log()
        centre, width = student_mean(ratios)
        low, high = (centre - width).exp(), (centre + width).exp()
        print(f"{bits} bits  {method:14}{mean:8.4f} ± {radius:.4f}   [{low:.2f}, {high:.2f}]")
    draw(found, out)
    return found


def draw(found: Found, out: Path) -> None:
    from hessfunc.plot.style import PALETTE, clean, legend, new_axes

    ax, widths = clean(new_axes()), sorted({bits for bits, _ in found})
    for method, colour in zip(METHODS, PALETTE, strict=False):
        means, radii = zip(
            *(student_mean(torch.tensor(found[bits, method])) for bits in widths), strict=True
        )
        ax.errorbar(widths, means, radii, color=colour, label=method, capsize=2)
    ax.set(xlabel="bits per weight", ylabel="KL divergence", yscale="log", xticks=widths)
    legend(ax)
    ax.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("rounding.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
