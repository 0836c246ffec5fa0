"""Curvature of neural networks, as functions.

A curvature matrix is a function ``(params, batch) -> matvec``. Transforms build and combine such
functions; algorithms consume the matvec.
"""

import sys

from hessfunc.lazy import FamilyImporter, LazyPackage

__version__ = "0.1.0"

# Public functions in the order in which a user meets them, each with the module that defines it.
# Type checkers read `__init__.pyi` instead.
_HOMES = {
    # A model and a loss as pure functions
    "functional": "modules",
    "supervised": "losses",
    "composed": "losses",
    "linear_head_loss": "linear_head",
    "language_model_loss": "language_models",
    "linear_cross_entropy": "autograd.linear_cross_entropy",
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
    "hvp_by_backward": "transforms.by_backward",
    "activations": "transforms.activations",
    "with_output_hessian": "transforms.criteria",
    "tune": "transforms.tuning",
    # Data sets and ranks
    "over_batches": "transforms.batches.mean",
    "draws": "transforms.batches.draws",
    "examples": "transforms.batches.examples",
    "microbatches": "transforms.batches.examples",
    "sharded": "spaces.sharded",
    "unsharded": "modules",
    "memory_limit": "memory",
    # Matvecs and vectors
    "apply": "transforms.matvecs",
    "batched": "transforms.matvecs",
    "dense": "transforms.matvecs",
    "check": "algorithms.check",
    "matrix": "algorithms.matrix",
    "inner": "spaces.of",
    "ravel": "spaces.of",
    "unravel": "spaces.of",
    "random_like": "spaces.of",
    "overlap": "algorithms.overlap",
    # Algorithms
    "lanczos": "algorithms.eigen.lanczos",
    "power_iteration": "algorithms.eigen.power",
    "stochastic_power_iteration": "algorithms.eigen.stochastic_power",
    "trace": "algorithms.trace.adaptive_deflation",
    "hutchinson": "algorithms.trace.hutchinson",
    "hutchpp": "algorithms.trace.hutchpp",
    "xtrace": "algorithms.trace.xtrace",
    "xnystrace": "algorithms.trace.xnystrace",
    "sampled_trace": "algorithms.trace.sampled",
    "diagonal": "algorithms.diagonal.adaptive_deflation",
    "hutchinson_diagonal": "algorithms.diagonal.hutchinson",
    "xdiag": "algorithms.diagonal.xdiag",
    "slq": "algorithms.density",
    "trace_of_function": "algorithms.functions.spectral_sum",
    "logdet": "algorithms.functions.spectral_sum",
    "function": "algorithms.functions.product",
    "cg": "algorithms.solve.cg",
    "minres": "algorithms.solve.minres",
    "pool": "algorithms.results",
    "load": "algorithms.results",
    # Recipes
    "hessian_trace": "recipes.hessian_trace",
    "ggn_diagonal": "recipes.gauss_newton_diagonal",
    "block_spectra": "recipes.block_spectra",
    "landscape": "recipes.landscape",
    "laplace": "recipes.laplace",
    "calibration": "recipes.calibration",
    "critical_sharpness": "recipes.sharpness",
    "implicit_gradient": "recipes.implicit_gradient",
    "influence": "recipes.influence",
    "self_influence": "recipes.influence",
    "generalized_sharpness": "algorithms.frank_wolfe",
    "stability": "optim.stability.limit",
}
# Public modules, each of which collects functions and types for one purpose.
_FAMILIES = {
    "matvecs": "transforms.matvecs",
    "kronecker": "kronecker",
    "optim": "optim",
    "tracking": "tracking",
    "results": "algorithms.results",
    "attached": "algorithms.attached",
    "plot": "plot",
    "compat": "compat",
}

__all__ = [*_HOMES, *_FAMILIES]

sys.modules[__name__].__class__ = LazyPackage
FamilyImporter(__name__, _FAMILIES).install()
