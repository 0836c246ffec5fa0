"""One sample of each class that is displayed, from real runs where a run is short."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import hessfunc as hf
from hessfunc.algorithms.eigen.follow import Followed
from hessfunc.algorithms.results import GeneralizedSharpness, LeafEstimate
from hessfunc.algorithms.results.influence import Influence, SelfInfluence
from hessfunc.display import Displayed
from hessfunc.kronecker import Congruence, Dense, DirectSum, Eigenbasis, Kronecker
from hessfunc.kronecker.block_error import BlockError
from hessfunc.kronecker.composite_blocks import Joint, Permuted
from hessfunc.kronecker.factored_blocks import DiagonalBlock
from hessfunc.kronecker.linear_maps import Layout
from hessfunc.recipes.block_spectra import BlockSpectra
from hessfunc.recipes.calibration import Calibration
from hessfunc.recipes.laplace import Posterior, Predictive
from hessfunc.tracking import Measurement, Point, Points

D = torch.float64
MATRIX = torch.diag(torch.arange(1.0, 9.0, dtype=D))
MATVEC = hf.dense(MATRIX)
LIKE = {"a<b>": torch.zeros(2, 3, dtype=D), "bias": torch.zeros(2, dtype=D)}
B = hf.unravel(torch.ones(8, dtype=D), LIKE)
BATCH = (torch.eye(3, dtype=D), torch.tensor([0, 1, 1]))
POINT = {"loss": 0.5, "top": (3.0, 2.0), "top_residuals": (0.1, 0.2), "trace": 4.0}


def problem() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    model_fn, params = hf.functional(model)
    return hf.supervised(model_fn, torch.nn.functional.cross_entropy), params, model


def blocks(kind: Callable[..., Any]) -> Any:
    loss, params, model = problem()
    return kind(loss, model)(params, BATCH)


def followed() -> Followed:
    pairs = hf.lanczos(MATVEC, LIKE, k=2, seed=0)
    return Followed(
        **{f.name: getattr(pairs, f.name) for f in dataclasses.fields(pairs)}, scout=LIKE
    )


def implicit_gradient() -> Any:
    h = torch.ones((), dtype=D)
    return hf.implicit_gradient(
        lambda p, h, b: hf.inner(p, p) / 2,
        lambda p, h, b: hf.inner(p, p) / 2 * h,
        torch.zeros(3, dtype=D),
        h,
        outer_batches=[0],
        inner_batches=[0],
        weight=lambda b: 1.0,
    )


def sharpness() -> Any:
    return hf.critical_sharpness(
        lambda p, b: 2 * p @ p, torch.ones(3, dtype=D), 0, torch.ones(3, dtype=D)
    )


def posterior() -> Posterior:
    loss, params, _ = problem()
    return hf.laplace(loss, params, [BATCH])


def dense_block(size: int = 2) -> Dense:
    return Dense(torch.eye(size, dtype=D), torch.Size([size]))


SAMPLES: dict[type[Displayed], Callable[[], Any]] = {
    type(hf.lanczos(MATVEC, LIKE, k=1, seed=0)): lambda: hf.lanczos(MATVEC, LIKE, k=3, seed=0),
    Followed: followed,
    hf.results.Estimate: lambda: hf.hutchinson(MATVEC, LIKE, max_matvecs=5, seed=0),
    LeafEstimate: lambda: LeafEstimate(2.0, 0.5, 3),
    hf.results.SampledEstimate: lambda: hf.sampled_trace(
        lambda i: hf.matvecs.scale(MATVEC, 1.0 + i % 2), LIKE, max_matvecs=8, seed=0
    ),
    hf.results.DiagonalEstimate: lambda: hf.hutchinson_diagonal(
        MATVEC, LIKE, max_matvecs=5, seed=0
    ),
    hf.results.Density: lambda: hf.slq(MATVEC, LIKE, probes=2, steps=4, seed=0),
    hf.results.Solution: lambda: hf.cg(MATVEC, B),
    hf.results.MatrixFunction: lambda: hf.function(MATVEC, torch.exp, B, max_matvecs=12),
    hf.results.ImplicitGradient: implicit_gradient,
    hf.results.Landscape: lambda: hf.landscape(
        lambda p, b: p @ p,
        torch.zeros(3, dtype=D),
        [0],
        torch.ones(3, dtype=D),
        points=5,
        weight=lambda b: 1.0,
    ),
    hf.results.Sharpness: sharpness,
    GeneralizedSharpness: lambda: hf.generalized_sharpness(
        MATVEC, torch.zeros(8, dtype=D), lambda v: (v.abs().sum(1), v.sign()), seed=0
    ),
    hf.results.Overlap: lambda: hf.overlap(hf.lanczos(MATVEC, LIKE, k=2, seed=0), B),
    hf.results.Check: lambda: hf.check(MATVEC, LIKE),
    BlockSpectra: lambda: hf.block_spectra(*problem()[:2], [BATCH]),
    Posterior: posterior,
    Predictive: lambda: posterior().predictive(hf.functional(problem()[2])[0], BATCH[0]),
    Calibration: lambda: hf.calibration(torch.eye(3, dtype=D), BATCH[1], bins=4),
    Measurement: lambda: Measurement(**POINT),
    Point: lambda: Point(**POINT, step=3, lr=0.1, edge=20.0),
    Points: lambda: Points(Point(**POINT, step=step) for step in range(3)),
    hf.optim.Stability: lambda: hf.optim.Stability(threshold=20.0, optimizer="SGD"),
    hf.kronecker.Blocks: lambda: blocks(hf.kronecker.kfac),
    Dense: dense_block,
    Kronecker: lambda: Kronecker(*2 * [torch.eye(2, dtype=D)[None]], torch.Size([2, 2])),
    Eigenbasis: lambda: next(iter(blocks(hf.kronecker.ekfac).values())),
    Congruence: lambda: Congruence(
        torch.eye(2, dtype=D), torch.ones(3, 1, 2, 1, dtype=D), torch.Size([2, 2])
    ),
    DirectSum: lambda: DirectSum((dense_block(), dense_block()), torch.Size([4])),
    DiagonalBlock: lambda: DiagonalBlock(torch.ones(2, dtype=D), torch.Size([2])),
    Permuted: lambda: Permuted(dense_block(4), Layout((1, 2, 2), (0, 2, 1)), torch.Size([2, 2])),
    Joint: lambda: Joint(dense_block(6), Layout((1, 2, 2)), torch.Size([6])),
    BlockError: lambda: hf.kronecker.error(MATVEC, MATVEC, LIKE, max_matvecs=6, seed=0),
    Influence: lambda: hf.influence(*problem()[:2], [BATCH], [BATCH], damping=0.1),
    SelfInfluence: lambda: hf.self_influence(*problem()[:2], [BATCH], damping=0.1),
}
