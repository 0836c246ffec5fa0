"""Curvature of neural networks, as functions.

A curvature matrix is a function ``(params, batch) -> matvec``; transforms make and combine such
functions, algorithms consume the matvec.
"""

from hessfunc.algorithms.density import slq
from hessfunc.algorithms.lanczos import lanczos
from hessfunc.algorithms.power import power_iteration
from hessfunc.algorithms.results import Density, Eigenpairs, Estimate, load
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.algorithms.trace.xtrace import xtrace
from hessfunc.checks import Check, check
from hessfunc.functional import Loss, composed, functional, hold, supervised
from hessfunc.transforms.arithmetic import add, apply, batched, deflate, dense, scale, shift
from hessfunc.transforms.batches import examples, microbatches, over_batches
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import random_like, ravel, split, unravel

__version__ = "0.1.0"

__all__ = [
    "Check",
    "Density",
    "Eigenpairs",
    "Estimate",
    "Loss",
    "add",
    "apply",
    "batched",
    "check",
    "composed",
    "deflate",
    "dense",
    "examples",
    "functional",
    "hold",
    "hutchinson",
    "hvp",
    "lanczos",
    "load",
    "microbatches",
    "over_batches",
    "power_iteration",
    "random_like",
    "ravel",
    "scale",
    "shift",
    "slq",
    "split",
    "supervised",
    "unravel",
    "xtrace",
]
