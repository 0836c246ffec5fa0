"""The interface of PyHessian 0.1, over `lanczos`, `hutchinson` and `slq`.

A script changes where it imports from, and no more:

    from hessfunc.compat.pyhessian import hessian            # from pyhessian import hessian
    from hessfunc.compat.pyhessian import group_product      # from pyhessian.utils import ...
    from hessfunc.compat.pyhessian import get_esd_plot       # from density_plot import ...

What is returned has the same shapes, types and order. Budgets keep their meaning, and tolerances
are what they say. These mistakes of PyHessian are not repeated:

- Eigenvalues: on convergence the estimate of the step before was returned, with the vector of the
  step after; a pair now belongs together, and its residual is measured. The stop looked at the
  change of the value, which is small wherever the iteration is slow; it now looks at the residual,
  and pairs that miss the tolerance are warned of.
- Trace: the stop looked at how much one more sample moves the mean, which is little by chance, and
  compared it with a trace that may be negative; it now looks at the 95 % interval.
- Density: ``torch.eig`` is gone from torch, and ``torch.linalg.eig`` of a symmetric matrix in
  float32 gives complex weights; nodes and weights are real, from float64. A Krylov space was
  exhausted only where a number was exactly zero, and else filled up with rounding errors; it now
  is where that number is no more than rounding, and the vectors are orthogonalised twice.
- Vectors were divided by ``|v| + 1e-6``; they are unit vectors.
- A parameter that the loss does not use was an error; its row of the Hessian is zero.
- The model stayed in eval mode, and its ``.grad`` got gradients with their graph, to which those of
  another `hessian` of it were added; it is evaluated in eval mode, and nothing of it is changed.
- ``cuda=True`` without a GPU, or with the model elsewhere, was an error; data go to where the
  parameters are.
- A loader that shows other examples in each pass gave products of different matrices; it is now
  refused.
- `orthnormal` changed its argument, and figures were drawn over each other.
- Activations (the fork's ``hessian_with_activation``): where layers share what they read, the
  product was not symmetric; probes were 0 and 1; layers without a gradient of the same shape were
  left out, the first one, Linear ones and smaller batches among them.
"""

from hessfunc.compat.pyhessian.activations import hessian_with_activation
from hessfunc.compat.pyhessian.density_plot import density_generate, get_esd_plot
from hessfunc.compat.pyhessian.hessian import hessian
from hessfunc.compat.pyhessian.vectors import (
    get_params_grad,
    group_add,
    group_product,
    hessian_vector_product,
    normalization,
    orthnormal,
)

__all__ = [
    "hessian",
    "hessian_with_activation",
    "get_esd_plot",
    "density_generate",
    "group_product",
    "group_add",
    "normalization",
    "orthnormal",
    "get_params_grad",
    "hessian_vector_product",
]
