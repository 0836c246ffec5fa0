"""pytorch-hessian-eigenthings 0.x, which its 1.0 removed: the top eigenpairs as NumPy arrays.

A script goes on with its import changed, ``from hessfunc.compat.eigenthings import
compute_hessian_eigenthings``. Values and vectors have the shapes and the order that they had: by
power iteration descending, by Lanczos ascending, vectors ``(k, n)`` in the order of
``parameters_to_vector``. What was wrong there is not here:

- Momentum subtracted the current vector, so that the value was lower by the momentum; it is the
  one before, in the scale of the current one.
- The mean over batches, and over the pieces of one, counted each alike; it counts examples.
- The graphs of all pieces of a batch lived at once, so that cutting saved no memory, and a piece
  could have nearly twice ``max_possible_gpu_samples`` examples; one lives at a time, and none is
  larger.
- ``init_vec`` of `lanczos` was ignored; it is the start.
- A deflated power iteration started from the vector before, which deflation sends to zero; each
  start is its own.
- Power iteration stopped when two estimates were close; it stops when the residual is small,
  relative to the value, or, with a warning, when the steps are spent. Both belong to one pair.
- ARPACK raised where it did not converge in ``max_steps`` restarts; pairs are returned, with a
  warning that tells their residuals.
- A fresh batch for each product (``full_dataset=False``) kept power iteration at the noise of a
  batch; its noise is reduced by a few products with all of them. Lanczos took its products from
  several matrices; it takes one batch for the whole run.
- In train mode BatchNorm moved its statistics at each product, and with Dropout each was with
  another matrix; the model is evaluated in eval mode, with a warning, and no module is touched.
- ``use_gpu=True`` failed without CUDA; vectors are where the parameters are. With CUDA the model
  is moved there, as before.
- A parameter that is frozen, or that the loss does not depend on, failed; the first is left out,
  the second has zeros.
- In float64 power iteration failed, and Lanczos rounded its vectors to float32; vectors have the
  dtype of the parameters.
- Arrays were reversed views, which `torch.from_numpy` refuses; they are plain.

Each call draws the seed of its start from torch's random stream, so that `torch.manual_seed`
makes a script repeat itself. Nothing is printed.
"""

from hessfunc.compat.eigenthings.compute import compute_hessian_eigenthings
from hessfunc.compat.eigenthings.hvp_operator import HVPOperator
from hessfunc.compat.eigenthings.lanczos import lanczos
from hessfunc.compat.eigenthings.operator import LambdaOperator, Operator
from hessfunc.compat.eigenthings.power_iter import deflated_power_iteration, power_iteration

__all__ = [
    "compute_hessian_eigenthings",
    "HVPOperator",
    "Operator",
    "LambdaOperator",
    "deflated_power_iteration",
    "power_iteration",
    "lanczos",
]
