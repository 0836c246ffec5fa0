"""BackPACK: its Hessian-free products, one vector at a time, by autograd alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.speed.asked import Alternative, Asked, Work, differentiable_twice, flat

_PACKAGE = "backpack-for-pytorch"


def _product(asked: Asked) -> Work:
    from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
    from backpack.hessianfree.hvp import hessian_vector_product

    case, params, vector = asked.case, asked.case.parameters, list(asked.vectors()[0])
    with differentiable_twice(case):
        outputs = case.model(case.inputs)
        loss = case.criterion(outputs, case.targets)
        if asked.matrix == "hessian":
            gradient = torch.autograd.grad(loss, params, create_graph=True)

    def call() -> Sequence[Tensor]:
        if asked.matrix == "ggn":
            return ggn_vector_product_from_plist(loss, outputs, params, vector)
        return hessian_vector_product(loss, params, vector, grad_params=gradient)

    return Work(call, flat)


PRODUCTS = [Alternative("BackPACK", _PACKAGE, "peer", _product, "graph kept, 1 vector")]
