"""Pruning by the diagonal of the Hessian (optimal brain damage) and by magnitude.

    python examples/pruning.py          # a table, and pruning.png

At a minimum, setting one weight w_i to zero raises the loss by its saliency, h_ii w_i^2 / 2, if the
Hessian is diagonal. LeCun, Denker and Solla 1990, Optimal brain damage, use the diagonal of the
Gauss-Newton matrix, which is positive; `ggn_diagonal` computes it exactly. The weights with the
smallest saliencies over all layers are set to zero at once, without further training.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.fit import accuracy, train
from hessfunc.app.problems.nets import mlp
from hessfunc.training.examples import Examples

Params = dict[str, Tensor]

SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Row:
    """Training losses and test accuracies at one sparsity, by method."""

    sparsity: float
    loss: dict[str, float]
    accuracy: dict[str, float]


def saliencies(model: nn.Module, seen: Examples) -> dict[str, Params]:
    """Return the saliency of each weight, by method; biases are not pruned."""
    model_fn, params = hf.functional(model)
    weights, biases = hf.split(params, "*.weight")
    loss = hf.hold(hf.supervised(model_fn, cross_entropy), biases)
    diagonal = hf.ggn_diagonal(loss, weights, seen.batches(500))
    return {
        "diagonal": {n: diagonal[n] * w**2 / 2 for n, w in weights.items()},
        "magnitude": {n: w.abs() for n, w in weights.items()},
        "random": hf.unravel(torch.rand(hf.ravel(weights).numel(), generator=seeded()), weights),
    }


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pruned(params: Params, saliency: Params, sparsity: float) -> Params:
    """Return the parameters, with this share of the weights, the least salient, at zero."""
    order = hf.ravel(saliency).argsort()
    keep = torch.ones(len(order))
    keep[order[: round(sparsity * len(order))]] = 0
    return params | {n: params[n] * kept for n, kept in hf.unravel(keep, saliency).items()}


def main(*, small: bool = False, out: Path = Path("pruning.png")) -> list[Row]:
    images = digits()
    seen, held_out = images[:1500], images[1500:]
    model = train(
        lambda: mlp([64, 64, 32, 10]), seen, epochs=15 if small else 30, weight_decay=1e-4
    )
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    methods = saliencies(model, seen)
    names = "".join(f"{name:>11}" for name in methods)
    print(f"{'':8}{'training loss':>{len(names)}}   {'test accuracy':>{len(names)}}")
    print(f"sparsity{names}   {names}")
    rows = []
    for sparsity in SPARSITIES:
        losses, accuracies = {}, {}
        for name, saliency in methods.items():
            model.load_state_dict(pruned(params, saliency, sparsity))
            with torch.no_grad():
                losses[name] = float(cross_entropy(model(seen.inputs), seen.targets))
            accuracies[name] = accuracy(model, held_out)
        rows.append(Row(sparsity, losses, accuracies))
        shown = "".join(f"{x:11.4f}" for x in losses.values())
        print(f"{sparsity:8.0%}{shown}   " + "".join(f"{x:11.1%}" for x in accuracies.values()))
    draw(rows, out)
    return rows


def draw(rows: list[Row], out: Path) -> None:
    from hessfunc.plot.style import PALETTE, clean, legend, new_axes

    ax = clean(new_axes())
    for name, colour in zip(rows[0].loss, PALETTE, strict=False):
        points = [row.loss[name] for row in rows]
        ax.plot([row.sparsity for row in rows], points, marker="o", color=colour, label=name)
    ax.set(xlabel="share of weights at zero", ylabel="training loss", yscale="log")
    legend(ax)
    ax.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="Use a small problem that takes a few seconds."
    )
    parser.add_argument("--out", type=Path, default=Path("pruning.png"), help="File of the figure.")
    main(**vars(parser.parse_args()))
