"""Curvature of neural networks, as functions.

A curvature matrix is a function ``(params, batch) -> matvec``; transforms make and combine such
functions, algorithms consume the matvec.
"""

from hessfunc.algorithms.density import slq
from hessfunc.algorithms.diagonal.hutchinson import hutchinson_diagonal
from hessfunc.algorithms.diagonal.xdiag import xdiag
from hessfunc.algorithms.lanczos import lanczos
from hessfunc.algorithms.power import power_iteration
from hessfunc.algorithms.results import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    SampledEstimate,
    Solution,
    load,
    pool,
)
from hessfunc.algorithms.solve.cg import cg
from hessfunc.algorithms.solve.minres import minres
from hessfunc.algorithms.stochastic_power import stochastic_power_iteration
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.algorithms.trace.hutchpp import hutchpp
from hessfunc.algorithms.trace.sampled import sampled_trace
from hessfunc.algorithms.trace.xnystrace import xnystrace
from hessfunc.algorithms.trace.xtrace import xtrace
from hessfunc.checks import Check, check
from hessfunc.functional import Loss, composed, functional, hold, sliced, supervised
from hessfunc.hbp import Block, Blocks, ekfac, hbp, kfac, kflr, kfra
from hessfunc.landscape import Landscape, landscape
from hessfunc.recompute import recomputed
from hessfunc.sharpness import Sharpness, adam_diagonal, critical_sharpness
from hessfunc.spectra import block_spectra
from hessfunc.training.absa import absa
from hessfunc.training.adversarial import fgsm, pgd
from hessfunc.training.exact import exact_blocks
from hessfunc.training.newton import Newton, NewtonState, newton
from hessfunc.training.optimizer import NewtonOptimizer
from hessfunc.training.solvers import conjugate_gradients, direct
from hessfunc.training.tracking import Measurement, Point, Tracker, Tracking, tracked, tracking
from hessfunc.transforms.activations import activations
from hessfunc.transforms.arithmetic import (
    add,
    apply,
    batched,
    deflate,
    dense,
    per_block,
    precondition,
    scale,
    shift,
)
from hessfunc.transforms.batches import examples, microbatches, over_batches
from hessfunc.transforms.criteria import with_output_hessian
from hessfunc.transforms.draws import Draws, draws
from hessfunc.transforms.gauss_newton import efvp, fvp, ggnvp
from hessfunc.transforms.hessian import hvp
from hessfunc.transforms.positive_curvature import pchvp
from hessfunc.trees import random_like, ravel, split, unravel

__version__ = "0.1.0"

__all__ = [
    # A model and a loss as pure functions
    "functional",
    "supervised",
    "composed",
    "Loss",
    "split",
    "hold",
    "sliced",
    "recomputed",
    # Curvature functions
    "hvp",
    "ggnvp",
    "fvp",
    "efvp",
    "pchvp",
    "activations",
    "with_output_hessian",
    "over_batches",
    "draws",
    "Draws",
    "examples",
    "microbatches",
    # Block-diagonal curvature with structure
    "hbp",
    "kfra",
    "kflr",
    "kfac",
    "ekfac",
    "Blocks",
    "Block",
    # Matvec arithmetic
    "apply",
    "shift",
    "scale",
    "add",
    "deflate",
    "precondition",
    "per_block",
    "batched",
    "dense",
    "ravel",
    "unravel",
    "random_like",
    # Algorithms
    "power_iteration",
    "stochastic_power_iteration",
    "lanczos",
    "hutchinson",
    "hutchpp",
    "xtrace",
    "xnystrace",
    "sampled_trace",
    "hutchinson_diagonal",
    "xdiag",
    "slq",
    "cg",
    "minres",
    "block_spectra",
    "landscape",
    "critical_sharpness",
    "adam_diagonal",
    "check",
    # Training
    "newton",
    "Newton",
    "NewtonState",
    "NewtonOptimizer",
    "exact_blocks",
    "conjugate_gradients",
    "direct",
    "absa",
    "fgsm",
    "pgd",
    "tracked",
    "tracking",
    "Tracker",
    "Tracking",
    # Results
    "Eigenpairs",
    "Estimate",
    "SampledEstimate",
    "DiagonalEstimate",
    "Density",
    "Solution",
    "Sharpness",
    "Landscape",
    "Measurement",
    "Point",
    "Check",
    "pool",
    "load",
]
