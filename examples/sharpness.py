"""Sharpness during training, compared with 2 / lr.

    python examples/sharpness.py        # a table, and sharpness.png

Full-batch gradient descent makes the loss sharper, until the largest eigenvalue of the Hessian
reaches 2 / lr. Above this value gradient descent diverges on a quadratic. The sharpness hovers
there while training continues: the edge of stability (Cohen et al. 2021, arXiv 2103.00065). With
small batches it stays below. `tracked` measures the sharpness from within an ordinary loop. Each
measurement starts from the previous eigenvector and takes a few products.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import hessfunc as hf
from hessfunc import plot
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.nets import mlp

LR = 0.14


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


def trained(
    inputs: Tensor, targets: Tensor, *, batch_size: int, steps: int, every: int
) -> list[hf.tracking.Point]:
    """Train a tanh perceptron, with a new random batch for each step; return its points."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp([64, 64, 64, 10], nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with hf.tracking.tracked(
        model, squared_error, [(inputs, targets)], every=every, optimizer=optimizer
    ) as tracker:
        for _ in range(steps):
            chosen = torch.randperm(len(inputs), generator=generator)[:batch_size]
            optimizer.zero_grad()
            squared_error(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            tracker.step()
    return tracker.points


def main(
    *, small: bool = False, out: Path = Path("sharpness.png")
) -> dict[str, list[hf.tracking.Point]]:
    images = digits()[: 300 if small else 1000]
    inputs = (images.inputs - images.inputs.mean()) / images.inputs.std()
    targets = one_hot(images.targets, 10).float()
    steps = 400 if small else 3000
    sizes = {"full batch": len(images), "batches of 16": 16}
    tracks = {
        name: trained(inputs, targets, batch_size=size, steps=steps, every=steps // 50)
        for name, size in sizes.items()
    }
    print(f"2 / lr = {2 / LR:.1f}\n")
    for name, points in tracks.items():
        products = sum(point.matvecs for point in points[1:]) / (len(points) - 1)
        print(f"{name}, {products:.1f} products per point")
        print(f"{'step':>6}{'loss':>10}{'sharpness':>11}")
        for point in points[:: len(points) // 10]:
            print(f"{point.step:6}{point.loss:10.4f}{point.top[0]:11.2f}")
        print()
    draw(tracks, out)
    return tracks


def draw(found: dict[str, list[hf.tracking.Point]], out: Path) -> None:
    from hessfunc.plot.style import grid, note

    panels = grid(1, len(found), (9.6, 3.6))
    panels[1].sharey(panels[0])
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        plot.tracked(points, ax=panel)
        note(panel, (name,))
    panels[0].figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="Use a small problem that takes a few seconds."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("sharpness.png"), help="File of the figure."
    )
    main(**vars(parser.parse_args()))
