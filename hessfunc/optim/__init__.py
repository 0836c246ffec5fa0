"""Optimisation with curvature: Newton steps, adaptive batch sizes, and the limits of stability."""

from hessfunc.optim.adversarial import fgsm, pgd
from hessfunc.optim.newton import Newton, NewtonState, newton
from hessfunc.optim.optimizer import NewtonOptimizer
from hessfunc.optim.schedules import absa
from hessfunc.optim.solvers import conjugate_gradients, direct
from hessfunc.optim.stability.norms import (
    CombinedNorm,
    InfinityNorm,
    LargestNorm,
    PreconditionedNorm,
    Preconditioner,
    SpectralNorm,
)
from hessfunc.optim.stability.result import Stability

__all__ = [
    "CombinedNorm",
    "InfinityNorm",
    "LargestNorm",
    "Newton",
    "NewtonOptimizer",
    "NewtonState",
    "PreconditionedNorm",
    "Preconditioner",
    "SpectralNorm",
    "Stability",
    "absa",
    "conjugate_gradients",
    "direct",
    "fgsm",
    "newton",
    "pgd",
]
