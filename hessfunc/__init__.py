"""Curvature of neural networks, as functions.

A curvature matrix is a function ``(params, batch) -> matvec``; transforms make and combine such
functions, algorithms consume the matvec.
"""

import sys

from hessfunc.deferred import Deferred

__version__ = "0.1.0"

# The public names in the order in which a user meets them, each with the module that defines it.
# Type checkers read them in `__init__.pyi`.
_HOMES = {
    # A model and a loss as pure functions
    "functional": "functional",
    "supervised": "functional",
    "composed": "functional",
    "Loss": "functional",
    "split": "trees",
    "hold": "functional",
    "sliced": "functional",
    "recomputed": "recompute",
    # Curvature functions
    "hvp": "transforms.hessian",
    "ggnvp": "transforms.gauss_newton",
    "fvp": "transforms.gauss_newton",
    "efvp": "transforms.gauss_newton",
    "pchvp": "transforms.positive_curvature",
    "functional_hvp": "transforms.functional_hessian",
    "activations": "transforms.activations",
    "with_output_hessian": "transforms.criteria",
    "over_batches": "transforms.batches",
    "sharded": "distributed.sharded",
    "hvp_by_backward": "transforms.by_backward",
    "unsharded": "distributed.unsharded",
    "draws": "transforms.draws",
    "Draws": "transforms.draws",
    "examples": "transforms.batches",
    "microbatches": "transforms.batches",
    # Block-diagonal curvature with structure
    "hbp": "hbp",
    "kfra": "hbp",
    "kflr": "hbp",
    "kfac": "hbp",
    "ekfac": "hbp",
    "Blocks": "hbp",
    "Block": "hbp",
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
    "to_scipy": "linear_operators",
    "from_scipy": "linear_operators",
    "compiled": "transforms.compiled",
    "tune": "transforms.tuning",
    "ravel": "trees",
    "unravel": "trees",
    "random_like": "trees",
    # Algorithms
    "power_iteration": "algorithms.power",
    "stochastic_power_iteration": "algorithms.stochastic_power",
    "lanczos": "algorithms.lanczos",
    "hutchinson": "algorithms.trace.hutchinson",
    "hutchpp": "algorithms.trace.hutchpp",
    "xtrace": "algorithms.trace.xtrace",
    "xnystrace": "algorithms.trace.xnystrace",
    "sampled_trace": "algorithms.trace.sampled",
    "hessian_trace": "hessian_trace",
    "ggn_diagonal": "gauss_newton_diagonal",
    "hutchinson_diagonal": "algorithms.diagonal.hutchinson",
    "xdiag": "algorithms.diagonal.xdiag",
    "slq": "algorithms.density",
    "cg": "algorithms.solve.cg",
    "minres": "algorithms.solve.minres",
    "block_spectra": "spectra",
    "landscape": "landscape",
    "critical_sharpness": "sharpness",
    "adam_diagonal": "sharpness",
    "check": "checks",
    # Training
    "newton": "training.newton",
    "Newton": "training.newton",
    "NewtonState": "training.newton",
    "NewtonOptimizer": "training.optimizer",
    "exact_blocks": "training.exact",
    "conjugate_gradients": "training.solvers",
    "direct": "training.solvers",
    "absa": "training.absa",
    "fgsm": "training.adversarial",
    "pgd": "training.adversarial",
    "tracked": "training.tracking",
    "tracking": "training.tracking",
    "Tracker": "training.tracking",
    "Tracking": "training.tracking",
    # Results
    "Eigenpairs": "algorithms.results",
    "Estimate": "algorithms.results",
    "SampledEstimate": "algorithms.results",
    "DiagonalEstimate": "algorithms.results",
    "Density": "algorithms.results",
    "Solution": "algorithms.results",
    "Sharpness": "sharpness",
    "Landscape": "landscape",
    "Measurement": "training.tracking",
    "Point": "training.tracking",
    "Check": "checks",
    "pool": "algorithms.results",
    "load": "algorithms.results",
}

__all__ = list(_HOMES)

sys.modules[__name__].__class__ = Deferred
