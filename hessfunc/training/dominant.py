"""The dominant eigenvalue of a model's Hessian as the model moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn
from torch.nn import functional as F

from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.losses import supervised
from hessfunc.modules import eval_mode, functional
from hessfunc.spaces.of import random_like, space_of
from hessfunc.training.steps import Criterion
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import Tree, tree_map

# Length of the random vector that is added to the unit vector of the last measurement.
_RANDOM = 0.3

# The vectors of the last measurement, or None -> the dominant eigenpair.
Watch: TypeAlias = Callable[[Tree | None], Eigenpairs]


def watch(
    model: nn.Module,
    batches: Iterable[Any],
    /,
    *,
    criterion: Criterion = F.cross_entropy,
    rtol: float = 1e-2,
    max_matvecs: int = 10,
    seed: int = 0,
) -> Watch:
    """What measures the eigenvalue that is largest in absolute value, at the current parameters.

    In eval mode; the model is not changed. Started near the vector of the last measurement it needs
    a few products. A random vector is added to it, so that an eigenvalue that has overtaken the
    last one is found: its eigenvector may be orthogonal to the last one, but not to the sum.

    Args:
        model: whose parameters move between two measurements.
        batches: the Hessian is that of the mean loss over their examples.
        criterion: ``(outputs, targets) -> mean over the examples``.
        rtol: the relative residual that is small enough.
        max_matvecs: the budget of a measurement.
        seed: of the first start.

    Cost: at most ``max_matvecs`` passes over the batches.
    """
    with eval_mode(model):
        model_fn, params = functional(model)
    curvature = over_batches(hvp(supervised(model_fn, criterion)))

    def measure(start: Tree | None) -> Eigenpairs:
        return lanczos(
            curvature(params, batches),
            params,
            k=1,
            rtol=rtol,
            max_matvecs=max_matvecs,
            start=None if start is None else _near(start, params, seed),
            search=0,
            seed=seed,
        )

    return measure


def _near(vectors: Tree, params: Tree, seed: int) -> Tree:
    """The last vector, a block of one, with a random vector added."""
    share = _RANDOM / space_of(params).n ** 0.5
    random = random_like(params, 1, kind="normal", seed=seed)
    return tree_map(lambda last, drawn: last + share * drawn, vectors, random)
