"""Training with a penalty on the top eigenvalue of the Hessian.

    python examples/penalty.py          # a table, and penalty.png

    minimise  L(w) + penalty * largest eigenvalue of the Hessian of L at w

The eigenvector comes from `lanczos`, started from the previous one. `attached.eigenvalues` gives
the eigenvalue the graph of the weights: its derivative is v' dH v, a third derivative of the loss.
The solver is not differentiated. The net is a perceptron on digits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.nets import mlp

Batch = tuple[Tensor, Tensor]
PENALTIES = (0.0, 0.003, 0.03)


@dataclass
class Trained:
    """Training losses and top eigenvalues at some steps, and the accuracy on other digits."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tops: list[float] = field(default_factory=list)
    accuracy: float = 0.0


def trained(seen: Batch, held_out: Batch, *, penalty: float, steps: int) -> Trained:
    """Train a net by gradient descent with momentum on all examples at once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp([64, 32, 32, 10], nn.Tanh).double()
    model_fn, _ = hf.functional(model)
    loss = hf.supervised(model_fn, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run, start = Trained(), None
    for step in range(steps + 1):
        weights = dict(model.named_parameters())
        with torch.no_grad():
            matvec = hf.hvp(loss)(weights, seen)
            top = hf.lanczos(matvec, weights, k=1, which="LA", start=start, seed=0, rtol=1e-2)
        start = top.vectors
        value = objective = loss(weights, seen)
        if penalty:
            with_graph = hf.hvp(loss, differentiable=True)(weights, seen)
            objective = value + penalty * hf.attached.eigenvalues(with_graph, top).sum()
        if step % 10 == 0:
            run.steps.append(step)
            run.losses.append(value.item())
            run.tops.append(float(top.values[0]))
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    with torch.no_grad():
        run.accuracy = float((model(held_out[0]).argmax(1) == held_out[1]).double().mean())
    return run


def main(*, small: bool = False, out: Path = Path("penalty.png")) -> dict[float, Trained]:
    images = digits()
    inputs, count = images.inputs.double(), 300 if small else 1000
    seen, held_out = (
        (inputs[part], images.targets[part]) for part in (slice(count), slice(1400, None))
    )
    steps = 60 if small else 300
    runs = {p: trained(seen, held_out, penalty=p, steps=steps) for p in PENALTIES}
    print(f"{'penalty':>8}{'loss':>10}{'largest top':>13}{'last top':>10}{'accuracy':>10}")
    for penalty, run in runs.items():
        print(
            f"{penalty:8}{run.losses[-1]:10.4f}{max(run.tops):13.2f}{run.tops[-1]:10.2f}"
            f"{run.accuracy:10.1%}"
        )
    draw(runs, out)
    return runs


def draw(runs: dict[float, Trained], out: Path) -> None:
    from hessfunc.plot.style import PALETTE, clean, grid, legend

    tops, losses = map(clean, grid(2, 1, (4.4, 5.2)))
    for (penalty, run), color in zip(runs.items(), PALETTE, strict=False):
        tops.plot(run.steps, run.tops, color=color, label=f"penalty {penalty:g}")
        losses.semilogy(run.steps, run.losses, color=color)
    tops.set(ylabel="largest eigenvalue", ylim=(0, None))
    losses.set(xlabel="step", ylabel="training loss")
    legend(tops)
    losses.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("penalty.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
