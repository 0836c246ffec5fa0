"""hessian-eigenthings: one flat vector at a time, a graph for each product."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.speed.asked import Alternative, Asked, Work, differentiable_twice

_PACKAGE = "hessian-eigenthings"


def operator_of(asked: Asked) -> Any:
    """Its operator of the matrix."""
    from hessian_eigenthings.operators.ggn import GGNOperator
    from hessian_eigenthings.operators.hessian import HessianOperator

    case = asked.case
    batches = asked.batches or [(case.inputs, case.targets)]
    if asked.matrix == "hessian":
        return HessianOperator(case.model, batches, lambda m, b: case.criterion(m(b[0]), b[1]))
    return GGNOperator(
        case.model, batches, lambda m, b: m(b[0]), lambda outputs, b: case.criterion(outputs, b[1])
    )


def _product(asked: Asked) -> Work:
    operator, row = operator_of(asked), asked.rows()[0]

    def call() -> Tensor:
        with differentiable_twice(asked.case):
            return operator.matvec(row)

    return Work(call, lambda image: image.detach()[None])


PRODUCTS = [Alternative(_PACKAGE, _PACKAGE, "peer", _product, "graph rebuilt, 1 vector")]
