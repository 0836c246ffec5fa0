"""Functions of ``pyhessian.utils``, under its name."""

from hessfunc.compat.pyhessian.vectors import (
    get_params_grad,
    group_add,
    group_product,
    hessian_vector_product,
    normalization,
    orthnormal,
)

__all__ = [
    "group_product",
    "group_add",
    "normalization",
    "orthnormal",
    "get_params_grad",
    "hessian_vector_product",
]
