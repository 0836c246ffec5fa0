"""Optimisation with curvature: Newton steps, their solvers, and adaptive batch sizes."""

from hessfunc.optim.adversarial import fgsm, pgd
from hessfunc.optim.newton import Newton, NewtonState, newton
from hessfunc.optim.optimizer import NewtonOptimizer
from hessfunc.optim.schedules import absa
from hessfunc.optim.solvers import conjugate_gradients, direct

__all__ = [
    "Newton",
    "NewtonOptimizer",
    "NewtonState",
    "absa",
    "conjugate_gradients",
    "direct",
    "fgsm",
    "newton",
    "pgd",
]
