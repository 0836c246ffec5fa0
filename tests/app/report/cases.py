"""Results of a small analysis, and a short training, made by hand."""

from dataclasses import replace
from typing import Any

import torch

from hessfunc.algorithms.results import Density, Eigenpairs, Estimate
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.app import report
from hessfunc.training import history
from hessfunc.training.loop import Record

COST = {"matvecs": 1234, "passes": 12, "reason": "converged", "seed": 7}

PAIRS = Eigenpairs(
    values=torch.tensor([5.0, -2.5], dtype=torch.float64),
    vectors={"x": torch.eye(2, 3)},
    residuals=torch.tensor([1e-5, 0.25], dtype=torch.float64),
    converged=torch.tensor([True, False]),
    largest=5.0,
    **COST,
)
SMALLEST = replace(
    PAIRS, values=PAIRS.values[1:], residuals=PAIRS.residuals[:1], converged=PAIRS.converged[:1]
)
TRACE = Estimate(
    value=4.0,
    stderr=0.5,
    degrees=1,
    samples=torch.tensor([3.5, 4.5], dtype=torch.float64),
    by_leaf={"first.weight": 4.125, "<b>": -0.125},
    **COST,
)
DENSITY = Density(
    nodes=torch.tensor([[-2.5, 0.0, 5.0], [-2.4, 0.1, 4.9]], dtype=torch.float64),
    weights=torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64),
    n=300,
    **COST,
)

_AXIS = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
_SAMPLED = {
    "normalise": None,
    "matvecs": 0,
    "passes": 0,
    "reason": "complete",
    "seed": None,
}
LINE = Landscape(
    values=0.25 + 2.5 * _AXIS.square(),
    x=_AXIS,
    y=None,
    lengths=torch.ones(1, dtype=torch.float64),
    evaluations=10,
    **_SAMPLED,
)
PLANE = Landscape(
    values=LINE.values[:, None] - _AXIS.square(),
    x=_AXIS,
    y=_AXIS,
    lengths=torch.ones(2, dtype=torch.float64),
    evaluations=50,
    **_SAMPLED,
)

SUBJECT = report.Subject("it", 12345, 100, 2, 0.5, "float32", "cpu")
RUN = report.Invocation("hessfunc analyze it", 7, "2024-02-29 12:00:00+00:00")
PARTS = [
    report.Part("eigenvalues", PAIRS, 1.25),
    report.Part("smallest", SMALLEST, 61.0),
    report.Part("trace", TRACE, 0.0),
    report.Part("density", DENSITY, 2.0),
    report.Part("line", LINE, 0.5),
    report.Part("plane", PLANE, 0.75),
]

START = Record(
    step=0,
    epoch=0.0,
    loss=2.5,
    minibatch_loss=None,
    accuracy=0.125,
    test_loss=2.75,
    test_accuracy=0.25,
    matvecs=0,
    gradients=0.0,
    seconds=0.0,
    peak_bytes=0,
    lr=0.1,
)
LAST = replace(
    START,
    step=1234,
    epoch=2.0,
    loss=0.5,
    minibatch_loss=0.75,
    accuracy=0.875,
    test_accuracy=0.625,
    gradients=4321.5,
    seconds=1.5,
    matvecs=77,
    ratio=4,
    lr=0.4,
)
TRAINED = history.Run(
    method="<sgd>, absa",
    seed=3,
    ended="complete",
    records=(START, replace(LAST, epoch=1.0, eigenvalue=-12.5), LAST),
)
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "arch": "c1",
    "lr": 0.1,
    "lr_decay_epochs": (30, 60),
    "data_path": None,
    "epochs": 2,
    "batch_size": 32,
    "examples": 100,
}
