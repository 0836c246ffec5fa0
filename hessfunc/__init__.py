"""Curvature of neural networks, as functions.

A curvature matrix is a function ``(params, batch) -> matvec``; transforms make and combine such
functions, algorithms consume the matvec.
"""

import sys

from hessfunc.lazy import Deferred

__version__ = "0.1.0"

# The public names in the order in which a user meets them, each with the module that defines it.
# Type checkers read them in `__init__.pyi`.
_HOMES = {
    # A model and a loss as pure functions
    "functional": "modules",
    "supervised": "losses",
    "composed": "losses",
    "Loss": "losses",
    "split": "selection",
    "hold": "losses",
    "sliced": "losses",
    "recomputed": "autograd.recompute",
    # Curvature functions
    "hvp": "transforms.hessian",
    "ggnvp": "transforms.gauss_newton",
    "fvp": "transforms.gauss_newton",
    "efvp": "transforms.gauss_newton",
    "pchvp": "transforms.positive_curvature",
    "functional_hvp": "transforms.functional_hessian",
    "activations": "transforms.activations",
    "with_output_hessian": "transforms.criteria",
    "over_batches": "transforms.batches.mean",
    "sharded": "spaces.sharded",
    "hvp_by_backward": "transforms.by_backward",
    "unsharded": "modules",
    "draws": "transforms.batches.draws",
    "Draws": "transforms.batches.draws",
    "examples": "transforms.batches.examples",
    "microbatches": "transforms.batches.examples",
    # Block-diagonal curvature with structure
    "hbp": "kronecker",
    "kfra": "kronecker",
    "kflr": "kronecker",
    "kfac": "kronecker",
    "ekfac": "kronecker",
    "Blocks": "kronecker",
    "Block": "kronecker",
    # Matvec arithmetic
    "apply": "transforms.arithmetic",
    "shift": "transforms.arithmetic",
    "scale": "transforms.arithmetic",
    "add": "transforms.arithmetic",
    "deflate": "transforms.arithmetic",
    "precondition": "transforms.arithmetic",
    "per_block": "transforms.arithmetic",
    "batched": "transforms.arithmetic",
    "dense": "transforms.arithmetic",
    "to_scipy": "compat.scipy",
    "from_scipy": "compat.scipy",
    "compiled": "transforms.compiled",
    "tune": "transforms.tuning",
    "ravel": "spaces.of",
    "unravel": "spaces.of",
    "random_like": "spaces.of",
    # Algorithms
    "power_iteration": "algorithms.eigen.power",
    "stochastic_power_iteration": "algorithms.eigen.stochastic_power",
    "lanczos": "algorithms.eigen.lanczos",
    "hutchinson": "algorithms.trace.hutchinson",
    "hutchpp": "algorithms.trace.hutchpp",
    "xtrace": "algorithms.trace.xtrace",
    "xnystrace": "algorithms.trace.xnystrace",
    "sampled_trace": "algorithms.trace.sampled",
    "hessian_trace": "recipes.hessian_trace",
    "ggn_diagonal": "recipes.gauss_newton_diagonal",
    "hutchinson_diagonal": "algorithms.diagonal.hutchinson",
    "xdiag": "algorithms.diagonal.xdiag",
    "slq": "algorithms.density",
    "cg": "algorithms.solve.cg",
    "minres": "algorithms.solve.minres",
    "block_spectra": "recipes.block_spectra",
    "landscape": "recipes.landscape",
    "critical_sharpness": "recipes.sharpness",
    "adam_diagonal": "recipes.sharpness",
    "check": "algorithms.check",
    # Training
    "newton": "optim.newton",
    "Newton": "optim.newton",
    "NewtonState": "optim.newton",
    "NewtonOptimizer": "optim.optimizer",
    "exact_blocks": "transforms.exact_blocks",
    "conjugate_gradients": "optim.solvers",
    "direct": "optim.solvers",
    "absa": "optim.schedules",
    "fgsm": "optim.adversarial",
    "pgd": "optim.adversarial",
    "tracked": "tracking",
    "tracking": "tracking",
    "Tracker": "tracking",
    "Tracking": "tracking",
    # Results
    "Eigenpairs": "algorithms.results",
    "Estimate": "algorithms.results",
    "SampledEstimate": "algorithms.results",
    "DiagonalEstimate": "algorithms.results",
    "Density": "algorithms.results",
    "Solution": "algorithms.results",
    "Sharpness": "recipes.sharpness",
    "Landscape": "recipes.landscape",
    "Measurement": "tracking",
    "Point": "tracking",
    "Check": "algorithms.check",
    "pool": "algorithms.results",
    "load": "algorithms.results",
}

__all__ = list(_HOMES)

sys.modules[__name__].__class__ = Deferred
