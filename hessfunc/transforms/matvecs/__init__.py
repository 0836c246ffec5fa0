"""Arithmetic of matvecs: shifted, scaled, added, deflated, preconditioned and compiled ones."""

from hessfunc.transforms.matvecs.arithmetic import (
    add,
    apply,
    batched,
    deflate,
    dense,
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
    "per_block",
    "precondition",
    "scale",
    "shift",
]
