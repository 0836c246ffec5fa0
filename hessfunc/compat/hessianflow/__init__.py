"""The face of HessianFlow: ``from hessfunc.compat import hessianflow as hf``.

One module stands for ``hessianflow``, ``hessianflow.optimizer``, ``.optm_utils`` and
``.progressbar``. Signatures and returned values are HessianFlow's; what was wrong there is not:

- Batches go to where the parameters lie; ``cuda`` is read no more, nor is the size of a batch.
- Every batch counts, by its examples; those smaller than the first were left out.
- A gradient that is made for an eigenvalue leaves no graph behind, and nothing in ``.grad``; the
  model keeps its mode, and torch's random stream its place.
- An eigenvalue is found when its residual is small, not when it has stopped to move; one that has
  not converged is warned of.
- ``baseline`` takes ``max_large_ratio`` batches a step, as it says; it always took one.
- No step crosses an epoch. Gradients that were left over went into a step of the next epoch, whose
  number of batches might be another.
- Learning rates decay where the schedule says; `exp_lr_scheduler` was missing where it was called.
- The optimiser's own step is made, so that any of torch will do; a copy of SGD's called signatures
  of tensors that torch has removed.
- ``absa`` compares eigenvalues of one and the same batch, not of a new one after each epoch, and by
  their absolute value. Its adversarial examples are those of the criterion.
- A loss that is not finite ends a training with an error.
- The checkpoint of ``--resume`` was never loaded; ``hessfunc eig --resume`` loads it.

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
