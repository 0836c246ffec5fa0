"""curvlinops: a block at once, by forward mode through a gradient that is made anew."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.speed.asked import Alternative, Asked, Work, differentiable_twice

_PACKAGE = "curvlinops-for-pytorch"


def operator_of(asked: Asked) -> Any:
    """Its operator of the matrix, without the passes over the data that check it."""
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    kind = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}[asked.matrix]
    case = asked.case
    batches = asked.batches or [(case.inputs, case.targets)]
    with differentiable_twice(case):
        return kind(
            case.model,
            nn.CrossEntropyLoss(),
            case.parameters,
            batches,
            check_deterministic=False,
            num_data=sum(len(inputs) for inputs, _ in batches),
        )


def _product(asked: Asked, k: int | None = None) -> Work:
    operator, columns = operator_of(asked), asked.columns()
    if k is not None:
        columns = [leaf[..., :k].contiguous() for leaf in columns]

    def call() -> list[Tensor]:
        with differentiable_twice(asked.case):
            return operator @ columns

    return Work(call, lambda images: torch.cat([x.movedim(-1, 0).flatten(1) for x in images], 1))


PRODUCTS = [Alternative("curvlinops", _PACKAGE, "peer", _product)]


def MODES(block: int) -> list[Alternative]:
    """With one vector, and with a block."""
    return [
        Alternative(
            "curvlinops, 1 vector", _PACKAGE, "peer", partial(_product, k=1), "forward, 1 vector"
        ),
        Alternative(
            f"curvlinops, {block} at once",
            _PACKAGE,
            "peer",
            _product,
            f"forward, {block} at once",
        ),
    ]
