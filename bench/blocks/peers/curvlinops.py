"""curvlinops: linear operators on columns, bound to a model and its data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from bench.blocks.problems import Problem


def factored(
    problem: Problem, fisher_type: str, sharing: str, *, corrected: bool = False
) -> Callable[[], Any]:
    """An operator with its factors computed."""
    model = copy.deepcopy(problem.model)
    params = list(model.parameters())

    def work() -> Any:
        cls = EKFACLinearOperator if corrected else KFACLinearOperator
        operator = cls(
            model,
            nn.CrossEntropyLoss(),
            params,
            [problem.batch],
            fisher_type=fisher_type,
            kfac_approx=sharing,
            separate_weight_and_bias=True,
            # What would cost further passes over the data, ours does not do either.
            check_deterministic=False,
            num_data=len(problem.inputs),
            num_per_example_loss_terms=1,
        )
        if corrected:
            operator.compute_eigenvalue_correction()
        else:
            operator.compute_kronecker_factors()
        return operator

    return work


def inverse(operator: Any, damping: float) -> Any:
    """``(A + damping I)^-1``, block by block."""
    return KFACInverseLinearOperator(operator, damping=damping, use_exact_damping=True)


def columns(vectors: dict[str, Tensor]) -> list[Tensor]:
    """A block of vectors, as curvlinops takes it."""
    return [rows.movedim(0, -1).contiguous() for rows in vectors.values()]


def products(operator: Any, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The products with a block of vectors."""
    images = operator @ columns(vectors)
    return {name: image.movedim(-1, 0) for name, image in zip(vectors, images, strict=True)}
