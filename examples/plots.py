"""Figures of each function of `hessfunc.plot`.

    python examples/plots.py        # the pictures of docs/reference/plot.md, in the folder plots

The net is the small conv net of `hessfunc analyze digits`. Trainings on the same digits, by SGD and
with batches that grow with the curvature, fill the figures of runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc import plot
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.nets import digits_convnet
from hessfunc.training.examples import Examples
from hessfunc.training.methods import SGD
from hessfunc.training.runs import run


def of_a_net(model: nn.Module, images: Examples) -> dict[str, Any]:
    """Return the figures of one trained net."""
    model_fn, params = hf.functional(model)
    loss, loader = hf.supervised(model_fn, cross_entropy), images.batches(250)
    matvec = hf.over_batches(hf.hvp(loss), keep=True)(params, loader)
    top = hf.lanczos(matvec, params, k=10, which="LA", rtol=1e-2, seed=0)
    rough = hf.lanczos(matvec, params, k=10, which="LA", rtol=1e-2, max_matvecs=22, seed=0)
    five = hf.lanczos(matvec, params, k=5, which="LA", rtol=1e-2, seed=0)
    gradient = torch.func.grad(loss)(params, loader[0])
    two = {name: leaf[:2] for name, leaf in top.vectors.items()}
    plane = hf.landscape(loss, params, loader[:1], two, radius=1.2, points=31, normalise="unit")
    lines = {
        name: hf.landscape(loss, params, loader[:1], direction, radius=1.2, normalise="unit")
        for name, direction in {
            "top eigenvector": {name: leaf[0] for name, leaf in top.vectors.items()},
            "gradient": gradient,
            "random": hf.random_like(params, 1, kind="normal", seed=0),
        }.items()
    }
    updates = [torch.func.grad(loss)(params, batch) for batch in loader[:4]]
    spectra = hf.block_spectra(loss, params, loader[:1], blocks=["0.*", "2.*", "5.*"])
    return {
        "density": plot.density(hf.slq(matvec, params, steps=80, seed=0), eigenvalues=top),
        "eigenvalues": plot.eigenvalues(rough),
        "layers": plot.layers(hf.trace(matvec, params, rtol=0.05, seed=0)),
        "blocks": plot.blocks(spectra),
        "curves": plot.curves(lines),
        "contours": plot.contours(plane),
        "surface": plot.surface(plane),
        "overlap": plot.overlap(
            hf.overlap(five, updates), columns=[f"gradient {i + 1}" for i in range(len(updates))]
        ),
    }


def of_trainings(images: Examples, epochs: int) -> dict[str, Any]:
    """Return the figures of trainings."""
    seen, held_out = images[: len(images) * 4 // 5], images[len(images) * 4 // 5 :]
    options: dict[str, Any] = {"epochs": epochs, "batch_size": 32, "seed": 0, "track": "top"}
    schedule = hf.optim.absa(epochs=epochs, max_ratio=8, patience=2, lr_decay_epochs=())
    plain = run("SGD", digits_convnet, SGD(lr=0.05), seen, held_out, **options)
    adaptive = run(
        "ABSA", digits_convnet, SGD(lr=0.05), seen, held_out, schedule=schedule, **options
    )
    measured = {r.epoch: [r.eigenvalue] for r in plain.records if r.eigenvalue is not None}
    ax = None
    for lr in (0.8, 1.2):
        points = tracked(images, lr, steps=20 * epochs)
        ax = plot.tracked(points, ax=ax, label=f"lr = {lr}")
    return {
        "history": plot.history(measured, lr=0.05, against="epoch"),
        "tracked": ax,
        "trainings": plot.trainings([plain, adaptive], batch_size=32),
    }


def tracked(images: Examples, lr: float, *, steps: int) -> list[hf.tracking.Point]:
    """Train by full-batch gradient descent, and return the points of a tracker."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr)
    batch = (images.inputs, images.targets)
    with hf.tracking.tracked(
        model, cross_entropy, [batch], every=5, optimizer=optimizer
    ) as tracker:
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            tracker.step()
    return tracker.points


def main(*, small: bool = False, out: Path = Path("plots")) -> dict[str, Any]:
    images = digits()[: 250 if small else 1500]
    epochs = 2 if small else 12
    axes = of_a_net(train(digits_convnet, images, epochs=epochs, seed=0), images)
    axes |= of_trainings(images, epochs)
    out.mkdir(parents=True, exist_ok=True)
    for name, drawn in axes.items():
        first = drawn[0] if name == "blocks" else drawn
        getattr(first, "figure", first).savefig(out / f"plot-{name}.png", dpi=120)
    return axes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="Use a small problem that takes a few seconds."
    )
    parser.add_argument("--out", type=Path, default=Path("plots"), help="Folder of the figures.")
    main(**vars(parser.parse_args()))
