"""Drop-in replacement for PyHessian 0.1, based on `lanczos`, `hutchinson` and `slq`.

A script changes only its imports:

    from hessfunc.compat.pyhessian import hessian            # from pyhessian import hessian
    from hessfunc.compat.pyhessian.utils import *            # from pyhessian.utils import *
    from hessfunc.compat.pyhessian.density_plot import get_esd_plot

Returned values have the same shapes, types and order. Budgets keep their meaning, and tolerances
are applied as documented. These mistakes of PyHessian are corrected:

- Eigenvalues: on convergence, PyHessian returned the value of the previous step with the vector of
  the next step. It stopped when the value changed little, which happens whenever the iteration is
  slow. Here value and vector belong together, the residual decides, and a pair that does not reach
  the tolerance causes a warning.
- Trace: PyHessian stopped when one more sample changed the mean little, which happens by chance,
  and compared the change with a trace that may be negative. Here the 95 % interval decides.
- Density: ``torch.eig`` no longer exists, and ``torch.linalg.eig`` of a symmetric matrix in float32
  returns complex weights. Here nodes and weights are real, and computed in float64. PyHessian ended
  a Krylov space only if a norm was exactly zero, and otherwise continued with rounding errors. Here
  the space ends when this norm is at rounding level, and vectors are orthogonalised twice.
- Vectors were divided by ``|v| + 1e-6``. Here they are unit vectors.
- A parameter that the loss does not use caused an error. Here its row of the Hessian is zero.
- The model stayed in eval mode, and its ``.grad`` received gradients with their graph, to which a
  second `hessian` of the model added its own. Here the model is evaluated in eval mode, and nothing
  in it changes.
- ``cuda=True`` without a GPU, or with the model on another device, caused an error. Here data are
  moved to the device of the parameters.
- A loader with other examples in each pass gave products of different matrices. Here it raises an
  error.
- `orthnormal` changed its argument, and figures were drawn over each other.
- Activations (``hessian_with_activation`` of the fork): the product was not symmetric if layers
  share their input, and probes were 0 and 1. Layers without a gradient of the same shape were left
  out, among them the first layer, Linear layers and smaller batches.
"""

from hessfunc.compat.pyhessian.density_plot import density_generate, get_esd_plot
from hessfunc.compat.pyhessian.hessian import hessian
from hessfunc.compat.pyhessian.hessian_with_activation import hessian_with_activation
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
