"""Arithmetic of matvecs: shift, scale, add, deflate, precondition and compile them."""

from hessfunc.transforms.matvecs.arithmetic import (
    add,
    apply,
    batched,
    deflate,
    dense,
    from_linear_operator,
    per_block,
    precondition,
    scale,
    shift,
)
from hessfunc.transforms.matvecs.compiled import compiled

__all__ = [
    "add",
    "apply",
    "batched",
    "compiled",
    "deflate",
    "dense",
    "from_linear_operator",
    "per_block",
    "precondition",
    "scale",
    "shift",
]
