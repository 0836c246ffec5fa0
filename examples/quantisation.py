"""Bit widths of layers from the traces of the Hessian (HAWQ).

    python examples/quantisation.py     # a table

Quantisation changes the weights of a layer by dW. Near a minimum it raises the loss by about
tr(H) |dW|^2 / 2n, if dW has a random direction. HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852;
HAWQ: Dong et al. 2019, arXiv 1905.03696) defines

    sensitivity(layer, bits) = (tr H_layer / n_layer) |Q(W, bits) - W|^2

and chooses the bits of all layers together, with the least total sensitivity within a budget of
size. One call of `xtrace` gives the traces of all layers as parts of the whole trace. The method
pays if layers differ: here, as in a conv net, the wide layers at the end need fewer bits than the
first ones. `python -m bench.quantisation` does the same for a trained Llama.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.algorithms.results import LeafEstimate
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.fit import accuracy, train
from hessfunc.app.problems.nets import mlp
from hessfunc.training.examples import Examples

Rounding = Callable[[Tensor, int], Tensor]

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Row:
    """Mean bits per weight, training loss and test accuracy of a net with quantised layers."""

    name: str
    bits: tuple[int, ...]
    mean_bits: float
    sensitivity: float
    loss: float
    accuracy: float


def quantised(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits evenly spaced values from the least to the largest weight."""
    low, high = weight.aminmax()
    step = (high - low) / (2**bits - 1)
    return low + step * ((weight - low) / step).round()


def traces(model: nn.Module, seen: Examples) -> Mapping[str, LeafEstimate]:
    """Return tr H of each weight tensor, with its interval."""
    model_fn, params = hf.functional(model)
    weights, biases = hf.split(params, "*.weight")
    loss = hf.hold(hf.supervised(model_fn, cross_entropy), biases)
    matvec = hf.over_batches(hf.hvp(loss))(weights, seen.batches(500))
    return hf.xtrace(matvec, weights, seed=0).by_leaf


def sensitivities(weight: Tensor, trace: float, rounded: Rounding) -> dict[int, float]:
    """Return the sensitivity of a layer at each number of bits."""
    moved = {bits: float((rounded(weight, bits) - weight).square().sum()) for bits in BITS}
    return {bits: trace / weight.numel() * square for bits, square in moved.items()}


def best(sizes: list[int], costs: list[dict[int, float]], mean_bits: float) -> tuple[int, ...]:
    """Return the bits of each layer with the least total sensitivity, at most ``mean_bits``."""
    unit = math.gcd(*sizes)
    budget = mean_bits * sum(sizes) / unit
    # The least sensitivity of the layers so far, and their bits, by the size that they take.
    least: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for size, cost in zip(sizes, costs, strict=True):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (used, (total, bits)), (b, c) in product(least.items(), cost.items()):
            taken = used + b * size // unit
            if taken <= budget and (taken not in longer or total + c < longer[taken][0]):
                longer[taken] = total + c, (*bits, b)
        least = longer
    return min(least.values())[1]


def main(*, small: bool = False) -> list[Row]:
    images = digits()
    seen, held_out = images[:1500], images[1500:]
    model = train(lambda: mlp([64, 32, 64, 128, 10]), seen, epochs=15 if small else 40)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}
    by_layer = traces(model, seen)
    costs = [sensitivities(w, by_layer[name], quantised) for name, w in weights.items()]
    sizes = [w.numel() for w in weights.values()]
    print(f"{'layer':12}{'weights':>9}{'trace':>9}{'95 % interval':>18}{'trace / n':>12}")
    for name, w in weights.items():
        trace, (low, high) = by_layer[name], by_layer[name].interval()
        interval = f"[{low:.2f}, {high:.2f}]"
        print(f"{name:12}{w.numel():9,}{trace:9.2f}{interval:>18}{trace / w.numel():12.5f}")

    def row(name: str, bits: tuple[int, ...]) -> Row:
        chosen = {n: quantised(w, b) for (n, w), b in zip(weights.items(), bits, strict=True)}
        model.load_state_dict(chosen, strict=False)
        with torch.no_grad():
            loss = float(cross_entropy(model(seen.inputs), seen.targets))
        size = sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)
        cost = sum(c[b] for c, b in zip(costs, bits, strict=True))
        return Row(name, bits, size, cost, loss, accuracy(model, held_out))

    rows = []
    for mean_bits in (3, 4, 5):
        rows.append(row("uniform", (mean_bits,) * len(sizes)))
        rows.append(row("by traces", best(sizes, costs, mean_bits)))
    print(f"\n{'':11}{'bits':18}{'mean':>5}{'sensitivity':>13}{'loss':>9}{'accuracy':>10}")
    for r in rows:
        bits = " ".join(map(str, r.bits))
        print(
            f"{r.name:11}{bits:18}{r.mean_bits:5.2f}{r.sensitivity:13.4f}{r.loss:9.4f}"
            f"{r.accuracy:10.1%}"
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="Use a small problem that takes a few seconds."
    )
    main(**vars(parser.parse_args()))
