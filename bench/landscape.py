"""A loss surface, point by point: hessfunc against a plain loop that moves the module's parameters.

    python -m bench.landscape [--points 11]

Along two random directions, filter-normalised, of a trained ResNet-20 on 100 images of CIFAR-10
(under HESSFUNC_DATA) and of two small nets on as many digits. The plain loop takes as many points
after each chunk of ours, so that both see the same machine; the ratio is the median over chunks.
Writes bench/results/landscape.md and .json, and the ResNet's surface as landscape.npz and .png.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from bench.interleaved import ratio
from hessfunc import plot
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.app.problems.data import cifar10, data_root, digits
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.nets import digits_convnet, mlp
from hessfunc.app.problems.resnet import load_weights, resnet
from hessfunc.recipes.landscape import landscape

EXAMPLES = 100
SMALL_NETS_POINTS = 51
RESULTS = Path(__file__).parent / "results"
WEIGHTS = "resnet20_cifar10/resnet20-12fca82f.th"


@dataclass(frozen=True)
class Case:
    """A net, its examples, and the two directions of its surface."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    directions: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Case:
        params = hf.functional(model)[1]
        return cls(name, model, batch, hf.random_like(params, 2, kind="normal", seed=0))

    def ours(self, points: int, callback: Callable[[Landscape], object]) -> Landscape:
        model_fn, params = hf.functional(self.model)
        return landscape(
            hf.supervised(model_fn, cross_entropy),
            params,
            [self.batch],
            self.directions,
            points=points,
            normalise="filter",
            callback=callback,
        )

    def plain(self, points: int) -> Iterator[float]:
        """The same as one would write it by hand, point after point, in a copy of the module."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        start = [p.clone() for p in model.parameters()]
        u, v = (
            [_filters(d[i], p) for d, p in zip(self.directions.values(), start, strict=True)]
            for i in (0, 1)
        )
        steps = torch.linspace(-1, 1, points).tolist()
        for x, y in product(steps, steps):
            for p, at, a, b in zip(model.parameters(), start, u, v, strict=True):
                p.copy_(at + x * a + y * b)
            yield float(cross_entropy(model(self.batch[0]), self.batch[1]))


def _filters(direction: Tensor, weights: Tensor) -> Tensor:
    if weights.dim() < 2:
        return torch.zeros_like(weights)
    lengths = weights.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
    return direction * lengths.view(-1, *[1] * (weights.dim() - 1))


@dataclass(frozen=True)
class Row:
    """One case: mean milliseconds a point, the ratio of the times, how far the values differ."""

    name: str
    parameters: int
    points: int
    ours: float
    plain: float
    ratio: float
    low: float
    high: float
    difference: float


def measured(case: Case, *, points: int) -> tuple[Row, Landscape]:
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    plain = case.plain(points)
    values: list[float] = []
    sizes: list[int] = []
    began = time.perf_counter()

    def turn(so_far: Landscape) -> None:
        nonlocal began
        taken = so_far.evaluations - len(values)
        middle = time.perf_counter()
        values.extend(islice(plain, taken))
        end = time.perf_counter()
        sizes.append(taken)
        seconds["ours"].append((middle - began) / taken)
        seconds["plain"].append((end - middle) / taken)
        began = time.perf_counter()

    found = case.ours(points, turn)
    means = {
        name: sum(n * s for n, s in zip(sizes, spent, strict=True)) / points**2
        for name, spent in seconds.items()
    }
    of_plain = ratio(seconds["ours"], seconds["plain"])
    by_hand = torch.tensor(values).view(points, points)
    row = Row(
        name=case.name,
        parameters=sum(p.numel() for p in case.model.parameters()),
        points=points,
        ours=1e3 * means["ours"],
        plain=1e3 * means["plain"],
        ratio=of_plain.median,
        low=of_plain.low,
        high=of_plain.high,
        difference=float(((found.values - by_hand) / by_hand).abs().max()),
    )
    return row, found


def small(make_model: Callable[[], nn.Module], name: str) -> Case:
    data = digits()
    model = train(make_model, data, epochs=2)
    return Case.of(name, model, (data.inputs[:EXAMPLES], data.targets[:EXAMPLES]))


def trained_resnet() -> Case:
    root = data_root()
    if root is None:
        raise SystemExit(f"set HESSFUNC_DATA to a folder with cifar10/ and {WEIGHTS}")
    model = resnet(20)
    model.load_state_dict(load_weights(root / WEIGHTS))
    data = cifar10(root)
    batch = data.inputs[:EXAMPLES], data.targets[:EXAMPLES]
    return Case.of("ResNet-20", model.eval(), batch)


def curvature(case: Case) -> tuple[float, float]:
    """The top eigenvalue, and the second difference of the loss along its vector, in float64."""
    model_fn, params = hf.functional(copy.deepcopy(case.model).double())
    loss = hf.supervised(model_fn, cross_entropy)
    batch = case.batch[0].double(), case.batch[1]
    top = hf.lanczos(hf.hvp(loss)(params, batch), params, k=1, which="LA", seed=0)
    # So short that no ReLU of any image has its kink between two points.
    step = 1e-5 / float(top.values[0]) ** 0.5
    found = landscape(loss, params, [batch], top.vectors, radius=step, points=3)
    below, at, above = found.values.tolist()
    return float(top.values[0]), (above - 2 * at + below) / step**2


def table(rows: list[Row]) -> str:
    lines = [
        f"Surfaces over {EXAMPLES} examples, {torch.get_num_threads()} thread, torch "
        f"{torch.__version__}; the means include all that is done once.",
        "",
        "| net | parameters | points | ms a point | of a plain loop "
        "| ratio (quartiles) | largest relative difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.parameters:,} | {row.points}^2 | {row.ours:.3g} "
            f"| {row.plain:.3g} | {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) "
            f"| {row.difference:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=11, help="on each axis, for the ResNet")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    net = trained_resnet()
    eigenvalue, second = curvature(net)
    cases = [small(lambda: mlp([64, 32, 10]), "MLP"), small(digits_convnet, "conv net"), net]
    rows: list[Row] = []
    for case in cases:
        points = arguments.points if case is net else SMALL_NETS_POINTS
        row, found = measured(case, points=points)
        rows.append(row)
        print(row, flush=True)
    found.save(RESULTS / "landscape.npz")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    plot.contours(found, ax=figure.add_subplot(1, 2, 1))
    plot.surface(found, ax=figure.add_subplot(1, 2, 2, projection="3d"))
    figure.savefig(RESULTS / "landscape.png", dpi=160)
    text = table(rows) + (
        f"\nAlong the ResNet's top eigenvector the second difference of the loss is {second:.5g}, "
        f"the eigenvalue {eigenvalue:.5g}.\n"
    )
    print(text)
    (RESULTS / "landscape.md").write_text(text)
    (RESULTS / "landscape.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
