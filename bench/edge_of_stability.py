"""Full-batch gradient descent at the edge of stability (Cohen et al. 2021, arXiv 2103.00065).

The largest eigenvalue of the Hessian rises to 2 / lr and hovers there. Run as
``python -m bench.edge_of_stability``; writes a table and a figure to bench/results/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import hessfunc as hf
from bench.report import environment
from hessfunc import plot
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.nets import mlp
from hessfunc.randomness import seeded
from hessfunc.tracking import Point, tracked

RESULTS = Path(__file__).parent / "results"
LEARNING_RATES = (0.15, 0.1, 0.07)
STEPS = 4000
EVERY = 10


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A tanh perceptron, and 1000 standardised digits with one-hot targets."""
    examples = digits()[:1000]
    inputs = (examples.inputs - examples.inputs.mean()) / examples.inputs.std()
    targets = torch.nn.functional.one_hot(examples.targets, 10).float()
    with seeded(0):
        model = mlp([64, 64, 64, 10], nn.Tanh)
    return model, (inputs, targets)


def descend(lr: float, *, steps: int, every: int, **options: Any) -> list[Point]:
    """The points of a training by full-batch gradient descent."""
    model, (inputs, targets) = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    batches = [(inputs, targets)]
    with tracked(
        model, squared_error, batches, every=every, optimizer=optimizer, **options
    ) as tracker:
        for _ in range(steps):
            optimizer.zero_grad()
            squared_error(model(inputs), targets).backward()
            optimizer.step()
            tracker.step()
    return tracker.points


@dataclass(frozen=True)
class Run:
    """One learning rate.

    Attributes:
        lr: the learning rate.
        points: that were tracked.
        lanczos: products of Lanczos from a random start to the same residual, at some of them.
    """

    lr: float
    points: list[Point]
    lanczos: list[int]

    @property
    def edge(self) -> float:
        return 2 / self.lr

    @property
    def sharpness(self) -> list[float]:
        """In units of 2 / lr."""
        return [point.top[0] / self.edge for point in self.points]

    @property
    def reached(self) -> int | None:
        """The first place at which the sharpness is 0.9 of the line."""
        return next((i for i, value in enumerate(self.sharpness) if value >= 0.9), None)


def measured(lr: float) -> Run:
    model, batch = problem()
    model_fn, params = hf.functional(model)
    curvature = hf.hvp(hf.supervised(model_fn, squared_error))
    lanczos: list[int] = []
    for steps in (0, 1000, 2000):
        descended(model, batch, lr, 1000 if steps else 0)
        found = hf.lanczos(curvature(params, batch), params, k=1, which="LA", rtol=0.01, seed=0)
        lanczos.append(found.matvecs)
    return Run(lr, descend(lr, steps=STEPS, every=EVERY, critical=True), lanczos)


def descended(model: nn.Module, batch: tuple[Tensor, Tensor], lr: float, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        squared_error(model(batch[0]), batch[1]).backward()
        optimizer.step()


def table(runs: Sequence[Run]) -> str:
    about = ", ".join(f"{key}: {value}" for key, value in environment().items())
    lines = [
        "# The edge of stability",
        "",
        about,
        "",
        f"Full-batch gradient descent, {STEPS} steps, of a tanh perceptron 64-64-64-10 on 1000 "
        f"digits, squared error; tracked every {EVERY} steps with the residual within 1 % and one "
        "guard. Sharpness in units of 2 / lr; after: from the first point at 0.9 on. Critical: the "
        "median of critical sharpness after, and its forward passes a point. Lanczos: products "
        "from a random start to the same residual.",
        "",
        "| lr | 2 / lr | at the start | 0.9 at step | least after | mean after | most after "
        "| critical | products, first point | products a point | most | Lanczos "
        "| forward passes | ms a point |",
        "|" + "---|" * 14,
    ]
    for run in runs:
        products = [point.matvecs for point in run.points]
        start = "never" if run.reached is None else f"{run.points[run.reached].step}"
        after = run.sharpness[run.reached or 0 :]
        critical = [point.critical for point in run.points[run.reached or 0 :] if point.critical]
        lines.append(
            f"| {run.lr} | {run.edge:.1f} | {run.sharpness[0]:.2f} | {start} "
            f"| {min(after):.2f} | {mean(after):.3f} | {max(after):.2f} "
            f"| {median(critical) / run.edge:.2f} | {products[0]} "
            f"| {mean(products[1:]):.2f} | {max(products[1:])} | {mean(run.lanczos):.1f} "
            f"| {mean(point.evaluations for point in run.points[1:]):.1f} "
            f"| {1e3 * median(point.seconds for point in run.points):.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for run, ax in zip(runs, figure.subplots(1, len(runs), sharey=True), strict=True):
        plot.tracked(run.points, ax=ax)
        ax.set_title(f"lr = {run.lr}", fontsize="medium")
        ax.label_outer()
    figure.savefig(path, dpi=160)


def main() -> None:
    torch.set_num_threads(1)
    runs = [measured(lr) for lr in LEARNING_RATES]
    RESULTS.mkdir(exist_ok=True)
    text = table(runs)
    print(text)
    (RESULTS / "edge_of_stability.md").write_text(text)
    draw(runs, RESULTS / "edge_of_stability.png")


if __name__ == "__main__":
    main()
