"""Drop-in replacement for HessianFlow: ``from hessfunc.compat import hessianflow as hf``.

This module replaces ``hessianflow``, ``hessianflow.optimizer``, ``.optm_utils`` and
``.progressbar``. Signatures and returned values are those of HessianFlow. These mistakes of
HessianFlow are corrected:

- Batches are moved to the device of the parameters. ``cuda`` and the batch size are ignored.
- Every batch counts, weighted by its examples. HessianFlow dropped batches smaller than the first.
- The gradient for an eigenvalue leaves no graph and nothing in ``.grad``. The model keeps its mode,
  and torch's random stream its state.
- An eigenvalue has converged when its residual is small, not when its value stops changing. An
  eigenvalue that has not converged causes a warning.
- ``baseline`` uses ``max_large_ratio`` batches in each step, as documented. HessianFlow always used
  one.
- No step crosses an epoch. In HessianFlow, remaining gradients went into a step of the next epoch,
  whose number of batches could differ.
- Learning rates decay according to the schedule. In HessianFlow, `exp_lr_scheduler` was undefined
  where it was called.
- The optimiser makes its own step, so that any optimiser of torch works. HessianFlow used a copy of
  SGD that called tensor methods with signatures that torch has removed.
- ``absa`` compares the absolute eigenvalues of one fixed batch. HessianFlow took a new batch after
  each epoch, and compared signed values. The adversarial examples use the given criterion.
- A loss that is not finite ends a training with an error.
- ``hessfunc eig --resume`` loads the checkpoint. HessianFlow never loaded that of ``--resume``.

Source: Yao, Gholami, Lei, Keutzer and Mahoney 2018, arXiv 1802.08241; Yao, Gholami, Keutzer and
Mahoney 2018, arXiv 1810.01021.
"""

from hessfunc.compat.hessianflow.eigen import get_eigen, get_eigen_full_dataset
from hessfunc.compat.hessianflow.optimizer import (
    absa,
    baseline,
    exp_lr_scheduler,
    progress_bar,
    test,
)

__all__ = [
    "get_eigen",
    "get_eigen_full_dataset",
    "absa",
    "baseline",
    "test",
    "exp_lr_scheduler",
    "progress_bar",
]
