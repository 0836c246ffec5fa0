"""PyHessian: one vector at a time, on the kept graph of one batch or over a loader."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bench.speed.asked import Alternative, Asked, Work, differentiable_twice, flat
from bench.speed.device import device


def hessian_of(asked: Asked) -> Any:
    """Its ``hessian`` of the batch or the batches."""
    # Else importing it would end where a warning is an error: it has invalid escapes.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    from pyhessian import hessian

    # It keeps gradients with their graphs, of which torch warns.
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    on_gpu = device().type == "cuda"
    of = (
        {"dataloader": asked.batches}
        if asked.batches
        else {"data": (asked.case.inputs, asked.case.targets)}
    )
    with differentiable_twice(asked.case):
        return hessian(asked.case.model, asked.case.criterion, cuda=on_gpu, **of)


def _of_batch(asked: Asked) -> Work:
    made, vector = hessian_of(asked), list(asked.vectors()[0])
    from pyhessian.utils import hessian_vector_product

    return Work(lambda: hessian_vector_product(made.gradsH, made.params, vector), flat)


def _of_loader(asked: Asked) -> Work:
    made, vector = hessian_of(asked), list(asked.vectors()[0])

    def call() -> list[torch.Tensor]:
        with differentiable_twice(asked.case):
            return made.dataloader_hv_product(vector)[1]

    return Work(call, flat)


PRODUCTS = [
    Alternative("PyHessian, graph kept", "PyHessian", "peer", _of_batch, "graph kept, 1 vector")
]
DATA = [Alternative("PyHessian, loader", "PyHessian", "peer", _of_loader)]
