"""Types of the public names, which `__init__.py` imports on first use."""

from hessfunc import compat as compat
from hessfunc import kronecker as kronecker
from hessfunc import optim as optim
from hessfunc import plot as plot
from hessfunc import tracking as tracking
from hessfunc.algorithms import attached as attached
from hessfunc.algorithms import results as results
from hessfunc.algorithms.check import check as check
from hessfunc.algorithms.density import slq as slq
from hessfunc.algorithms.diagonal.adaptive import diagonal as diagonal
from hessfunc.algorithms.diagonal.hutchinson import hutchinson_diagonal as hutchinson_diagonal
from hessfunc.algorithms.diagonal.xdiag import xdiag as xdiag
from hessfunc.algorithms.eigen.lanczos import lanczos as lanczos
from hessfunc.algorithms.eigen.power import power_iteration as power_iteration
from hessfunc.algorithms.eigen.stochastic_power import (
    stochastic_power_iteration as stochastic_power_iteration,
)
from hessfunc.algorithms.frank_wolfe import generalized_sharpness as generalized_sharpness
from hessfunc.algorithms.functions.product import function as function
from hessfunc.algorithms.functions.spectral_sum import logdet as logdet
from hessfunc.algorithms.functions.spectral_sum import trace_of_function as trace_of_function
from hessfunc.algorithms.matrix import matrix as matrix
from hessfunc.algorithms.results import load as load
from hessfunc.algorithms.results import pool as pool
from hessfunc.algorithms.solve.cg import cg as cg
from hessfunc.algorithms.solve.minres import minres as minres
from hessfunc.algorithms.trace.adaptive import trace as trace
from hessfunc.algorithms.trace.hutchinson import hutchinson as hutchinson
from hessfunc.algorithms.trace.hutchpp import hutchpp as hutchpp
from hessfunc.algorithms.trace.sampled import sampled_trace as sampled_trace
from hessfunc.algorithms.trace.xnystrace import xnystrace as xnystrace
from hessfunc.algorithms.trace.xtrace import xtrace as xtrace
from hessfunc.autograd.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from hessfunc.autograd.recompute import recomputed as recomputed
from hessfunc.language_models import language_model_loss as language_model_loss
from hessfunc.linear_head import linear_head_loss as linear_head_loss
from hessfunc.losses import Loss as Loss
from hessfunc.losses import composed as composed
from hessfunc.losses import hold as hold
from hessfunc.losses import sliced as sliced
from hessfunc.losses import supervised as supervised
from hessfunc.modules import functional as functional
from hessfunc.modules import unsharded as unsharded
from hessfunc.optim.stability.reading import stability as stability
from hessfunc.recipes.block_spectra import block_spectra as block_spectra
from hessfunc.recipes.gauss_newton_diagonal import ggn_diagonal as ggn_diagonal
from hessfunc.recipes.hessian_trace import hessian_trace as hessian_trace
from hessfunc.recipes.implicit_gradient import implicit_gradient as implicit_gradient
from hessfunc.recipes.landscape import landscape as landscape
from hessfunc.recipes.sharpness import critical_sharpness as critical_sharpness
from hessfunc.selection import split as split
from hessfunc.spaces.of import inner as inner
from hessfunc.spaces.of import random_like as random_like
from hessfunc.spaces.of import ravel as ravel
from hessfunc.spaces.of import unravel as unravel
from hessfunc.spaces.sharded import sharded as sharded
from hessfunc.transforms import matvecs as matvecs
from hessfunc.transforms.activations import activations as activations
from hessfunc.transforms.batches.draws import draws as draws
from hessfunc.transforms.batches.examples import examples as examples
from hessfunc.transforms.batches.examples import microbatches as microbatches
from hessfunc.transforms.batches.mean import over_batches as over_batches
from hessfunc.transforms.by_backward import hvp_by_backward as hvp_by_backward
from hessfunc.transforms.criteria import with_output_hessian as with_output_hessian
from hessfunc.transforms.functional_hessian import functional_hvp as functional_hvp
from hessfunc.transforms.gauss_newton import efvp as efvp
from hessfunc.transforms.gauss_newton import fvp as fvp
from hessfunc.transforms.gauss_newton import ggnvp as ggnvp
from hessfunc.transforms.hessian import hvp as hvp
from hessfunc.transforms.matvecs import apply as apply
from hessfunc.transforms.matvecs import batched as batched
from hessfunc.transforms.matvecs import dense as dense
from hessfunc.transforms.positive_curvature import pchvp as pchvp
from hessfunc.transforms.tuning import tune as tune

__version__: str
