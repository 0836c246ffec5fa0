"""Dominant eigenvalue of a model's Hessian during a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn
from torch.nn import functional as F

from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.losses import supervised
from hessfunc.modules import functional
from hessfunc.spaces.of import random_like, space_of
from hessfunc.training.steps import Criterion
from hessfunc.training_mode import eval_mode
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import Tree, tree_map

# Length of the random vector that is added to the last unit eigenvector.
_RANDOM = 0.3

# Function from the vectors of the last measurement, or None, to the dominant eigenpair.
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
    """Return a function that measures the eigenvalue of largest absolute value.

    The Hessian is that of the model in eval mode, at the current parameters. A measurement does not
    change the model. It starts near the eigenvector of the last measurement, and therefore needs
    few products. A random vector is added to the start, so that an eigenvalue that has overtaken
    the last one is detected: its eigenvector may be orthogonal to the last one, but not to the sum.

    Args:
        model: Module whose parameters change between two measurements.
        batches: Batches whose mean loss over examples has the Hessian.
        criterion: Function ``(outputs, targets) -> mean over the examples``.
        rtol: Relative tolerance of the residual.
        max_matvecs: Largest number of products of a measurement.
        seed: Seed of the first start vector, and of the random vector that is added later.

    Returns:
        A function from the last vectors (or None) to the dominant eigenpair.

    StepCost: at most ``max_matvecs`` passes over the batches for each measurement.
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
    """Add a random vector to the last eigenvector, a vector block with k = 1."""
    # A normal vector has a length of about sqrt(n), so that the random part has length _RANDOM.
    share = _RANDOM / space_of(params).n ** 0.5
    random = random_like(params, 1, kind="normal", seed=seed)
    return tree_map(lambda last, drawn: last + share * drawn, vectors, random)
