"""Command-line options of ``hessfunc train``, as one table of declarations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from hessfunc.app.cli.options import option

DATA = "Data"
SGD = "--optimizer sgd"
NEWTON = "--optimizer newton"
ABSA = "--method absa"


MethodName = Annotated[
    str,
    option("NAME", "sgd: batches of fixed size; absa: batches that grow where the loss is flat."),
]
OptimizerName = Annotated[
    str | None,
    option(
        "NAME",
        "Optimiser: sgd or newton.",
        default="newton if one of its options is given, else sgd",
    ),
]
CurvatureName = Annotated[
    str | None,
    option(
        "NAME",
        "Curvature matrix: hbp-none, hbp-zero, hbp-clip, hbp-abs; pch-none, pch-zero, "
        "pch-clip, pch-abs; ggn; hessian; kfra; kflr; kfac; ekfac.",
        default="hbp-abs",
        panel=NEWTON,
    ),
]
Epochs = Annotated[int, option("N", "Passes over the examples.", min=1)]
BatchSize = Annotated[int, option("N", "Examples per base batch.", min=1)]
LargeRatio = Annotated[
    int | None,
    option(
        "N",
        "Base batches per step: fixed for sgd, the maximum for absa.",
        default="1 for sgd, 128 for absa",
        min=1,
    ),
]
Lr = Annotated[float, option("X", "Learning rate.")]
LrDecay = Annotated[
    float, option("X", "Factor of the learning rate after each --lr-decay-epoch.", min=0)
]
LrDecayEpoch = Annotated[str, option("N,N", "Epochs after which the rate decays, counted from 1.")]
AdversarialShare = Annotated[
    float | None,
    option(
        "X",
        "Initial share of adversarial inputs in each base batch.",
        default="0.2",
        panel=ABSA,
        min=0,
        max=1,
    ),
]
Eps = Annotated[
    float | None,
    option(
        "X",
        "Size of the adversarial perturbation of the inputs.",
        default="0.005",
        panel=ABSA,
        min=0,
    ),
]
Patience = Annotated[
    int | None,
    option(
        "N", "Maximum number of epochs before the batch grows.", default="10", panel=ABSA, min=1
    ),
]
Momentum = Annotated[
    float | None,
    option("X", "Share of the previous step that is kept.", default="0.9", panel=SGD, min=0, max=1),
]
WeightDecay = Annotated[
    float | None,
    option(
        "X",
        "Add X times the parameters to the gradient, and so X / 2 times their squared "
        "norm to the loss.",
        default="0",
        panel=SGD,
        min=0,
    ),
]
Alpha = Annotated[
    float | None,
    option(
        "X",
        "Damping: weight of the identity in (1 - alpha) curvature + alpha I.",
        default="0.02",
        panel=NEWTON,
        min=0,
        max=1,
    ),
]
SolverName = Annotated[
    str | None,
    option(
        "NAME",
        "Solver: cg, or direct, which inverts the factors of the blocks.",
        default="cg",
        panel=NEWTON,
    ),
]
CgMax = Annotated[
    int | None,
    option(
        "N", "Stop CG after N products per parameter tensor.", default="50", panel=NEWTON, min=1
    ),
]
CgRtol = Annotated[
    float | None, option("X", "Relative tolerance of CG.", default="0.1", panel=NEWTON, min=0)
]
CgAtol = Annotated[
    float | None, option("X", "Absolute tolerance of CG.", default="0", panel=NEWTON, min=0)
]
MaxBlocks = Annotated[
    int | None,
    option(
        "N",
        "Split the curvature of each layer into N diagonal blocks (hbp).",
        default="1",
        panel=NEWTON,
        min=1,
    ),
]
ExampleCount = Annotated[
    int | None,
    option(
        "N",
        "Train on the first N examples, and test on at most N.",
        default="all",
        panel=DATA,
        min=1,
    ),
]
Tracked = Annotated[
    str | None,
    option(
        "NAME",
        "Record the dominant Hessian eigenvalue after each epoch: top (on 200 examples, "
        "or on a base batch if that is larger) or full (on all examples).",
        default="off",
    ),
]
TimeLimit = Annotated[float | None, option("X", "Stop after X minutes of training steps.", min=0)]
SeedNumber = Annotated[int, option("N", "Seed of weights, batches and random samples.")]
OutFolder = Annotated[Path, option("DIR", "Folder of the results.")]
SaveEvery = Annotated[int, option("N", "Save a checkpoint every N steps.", min=1)]
