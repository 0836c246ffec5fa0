"""The central flow, which describes gradient descent at the edge of stability.

    python examples/central_flow.py     # a table, and central_flow.png

Gradient descent raises the largest eigenvalue S of the Hessian to 2 / lr. Then it oscillates along
the eigenvector v, and gradient flow no longer describes it. An oscillation of variance s acts like
a penalty on S. The central flow is gradient flow with this penalty,

    dw/dt = -lr (grad L + s / 2 grad S),     grad S = grad of v'H(w)v with v held fixed,

with the smallest s >= 0 that keeps S at or below 2 / lr (Cohen et al. 2024, arXiv 2410.24206).
The net has one eigenvalue at the edge, and learns the Chebyshev polynomial T3 in 20 points.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value

import hessfunc as hf
from hessfunc.app.problems.nets import mlp

Loss = Callable[[Tensor, None], Tensor]
NAMES = DESCENT, FLOW, CENTRAL = "gradient descent", "gradient flow", "central flow"
SUBSTEPS = 2  # Euler steps of a flow in the time of one step of descent.
WINDOW = 40  # Steps over which paths are averaged before they are compared.


@dataclass(frozen=True)
class Found:
    """Edge 2 / lr, times in steps of descent, and each quantity of each path at these times."""

    edge: float
    steps: list[int]
    quantities: dict[str, dict[str, list[float]]]


def problem() -> tuple[Loss, Tensor]:
    """Return a loss of the flat vector of parameters, and its start."""
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_fn, params = hf.functional(mlp([1, 32, 32, 1], nn.Tanh).double())

    def loss(w: Tensor, batch: None) -> Tensor:
        return (model_fn(hf.unravel(w, params), x) - 4 * x**3 + 3 * x).square().mean() / 2

    return loss, hf.ravel(params)


def top(loss: Loss, w: Tensor, start: Tensor | None = None) -> hf.results.Eigenpairs:
    return hf.lanczos(hf.hvp(loss)(w, None), w, k=1, which="LA", start=start, seed=0, rtol=1e-4)


def path(loss: Loss, w: Tensor, name: str, *, lr: float, steps: int) -> Tensor:
    """Return the points of descent or of a flow after each step, shape ``[steps + 1, n]``."""
    substeps = 1 if name == DESCENT else SUBSTEPS
    dt, v, points = lr / substeps, None, [w]
    for _ in range(steps * substeps):
        slope = grad(loss)(w, None)
        if name == CENTRAL:
            v = top(loss, w, v).vectors[0]
            quadratic = lambda p: v @ hf.apply(hf.hvp(loss)(p, None), v)  # noqa: B023, E731
            rise, sharpness = grad_and_value(quadratic)(w)
            # Choose s for S = 2 / lr after the step: S - dt (slope + s / 2 rise) @ rise = 2 / lr.
            excess = (sharpness - 2 / lr) / dt - slope @ rise
            slope = slope + (excess / (rise @ rise)).clamp_min(0) * rise
        w = w - dt * slope
        points.append(w)
    return torch.stack(points[::substeps])


def main(*, small: bool = False, out: Path = Path("central_flow.png")) -> Found:
    lr, steps = (0.16, 500) if small else (0.08, 2400)
    loss, start = problem()
    paths = {name: path(loss, start, name, lr=lr, steps=steps) for name in NAMES}
    averages = {name: p.unfold(0, WINDOW + 1, 1).mean(-1) for name, p in paths.items()}
    times = list(range(WINDOW // 2, steps - WINDOW // 2 + 1, 10))
    distances = {n: (averages[n] - averages[DESCENT]).norm(dim=1)[::10].tolist() for n in NAMES[1:]}
    sharpness = {n: [float(top(loss, p[t]).values[0]) for t in times] for n, p in paths.items()}
    losses = {n: [float(loss(p[t], None)) for t in times] for n, p in paths.items()}
    print(f"2 / lr = {2 / lr}\n\n{'largest eigenvalue':>28}{'distance to descent':>30}")
    print(f"{'step':>6}{'descent':>10}{'flow':>8}{'central':>9}{'flow':>12}{'central':>9}")
    for i in range(0, len(times), len(times) // 16):
        row = [sharpness[n][i] for n in NAMES] + [distances[n][i] for n in NAMES[1:]]
        print("{:6}{:10.2f}{:8.2f}{:9.2f}{:12.3f}{:9.3f}".format(times[i], *row))
    rows = {"largest eigenvalue": sharpness, "loss": losses, "distance to descent": distances}
    draw(found := Found(2 / lr, times, rows), out)
    return found


def draw(found: Found, out: Path) -> None:
    from hessfunc.plot.style import PALETTE, clean, draw_edge, grid, legend

    colors = dict(zip(NAMES, (PALETTE[2], PALETTE[3], PALETTE[0]), strict=True))
    panels = grid(3, 1, (4.4, 6.6))
    for panel, (label, lines) in zip(map(clean, panels), found.quantities.items(), strict=True):
        panel.set_ylabel(label)
        for name, values in lines.items():
            panel.plot(found.steps, values, color=colors[name], label=name)
    draw_edge(panels[0], {0: found.edge}, end=found.steps[-1], label="2 / lr")
    panels[1].set_yscale("log")
    panels[2].set_xlabel("step")
    legend(panels[0])
    panels[0].figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("central_flow.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
