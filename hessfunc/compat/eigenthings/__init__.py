"""Drop-in replacement for pytorch-hessian-eigenthings 0.x, whose interface its 1.0 removed.

A script runs after its import is changed to ``from hessfunc.compat.eigenthings import
compute_hessian_eigenthings``. Values and vectors are NumPy arrays with the same shapes and order:
descending for power iteration, ascending for Lanczos, with vectors ``(k, n)`` in the order of
``parameters_to_vector``. These mistakes of the original are corrected:

- Momentum subtracted the current vector, so that the value was too low by the momentum. Here it
  subtracts the previous vector, in the scale of the current one.
- Means over batches, and over the pieces of a batch, had equal weights. Here they are weighted by
  examples.
- The graphs of all pieces of a batch were alive at once, so that splitting saved no memory, and a
  piece could have nearly twice ``max_possible_gpu_samples`` examples. Here one graph is alive at a
  time, and no piece is larger.
- `lanczos` ignored ``init_vec``. Here it is the start vector.
- A deflated power iteration started from the previous eigenvector, which deflation maps to zero.
  Here each pair has its own start.
- Power iteration stopped when two estimates were close. Here it stops when the residual relative
  to the value is small or, with a warning, when the steps are exhausted. Value and vector belong
  to one pair.
- ARPACK raised an error if it did not converge in ``max_steps`` restarts. Here the pairs are
  returned, with a warning that states their residuals.
- With a new batch for each product (``full_dataset=False``), power iteration kept the noise of a
  batch. Here a few products with all batches reduce the noise. Lanczos mixed products of several
  matrices; here it uses one batch for the whole run.
- In train mode, BatchNorm changed its statistics at each product, and with Dropout each product
  had another matrix. Here the model is evaluated in eval mode, with a warning, and no module
  changes.
- ``use_gpu=True`` failed without CUDA. Here vectors are on the device of the parameters. With CUDA,
  the model is moved there, as before.
- A parameter that is frozen, or on which the loss does not depend, caused an error. Here a frozen
  parameter is left out, and an unused one has zeros.
- In float64, power iteration failed, and Lanczos rounded its vectors to float32. Here vectors have
  the dtype of the parameters.
- Positional arguments of other versions landed in ``fp16`` or ``full_dataset``. Here they
  are refused unless they are bools.
- In float16, pairs with errors of any size were returned. Here a residual above 1 % of the value
  causes a warning.
- `spectral_density` took first entries of vectors as weights, without their square, the deviation
  for the variance, and as many points as vectors. `stochastic_lanczos` ended with an error where
  the Krylov space ended.
- Arrays were reversed views, which `torch.from_numpy` refuses. Here they are contiguous.

Each call draws the seed of its start from torch's random stream, so that a script is reproducible
with `torch.manual_seed`. Nothing is printed.
"""

from hessfunc.compat.eigenthings.compute import compute_hessian_eigenthings
from hessfunc.compat.eigenthings.hvp_operator import HVPOperator
from hessfunc.compat.eigenthings.lanczos import lanczos
from hessfunc.compat.eigenthings.operator import LambdaOperator, Operator
from hessfunc.compat.eigenthings.power_iter import deflated_power_iteration, power_iteration
from hessfunc.compat.eigenthings.spectral_density import spectral_density
from hessfunc.compat.eigenthings.stochastic_lanczos import stochastic_lanczos

__all__ = [
    "compute_hessian_eigenthings",
    "HVPOperator",
    "Operator",
    "LambdaOperator",
    "deflated_power_iteration",
    "power_iteration",
    "lanczos",
    "spectral_density",
    "stochastic_lanczos",
]
