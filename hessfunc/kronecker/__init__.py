"""Structured diagonal blocks of curvature matrices: Hessian backpropagation, KFAC and others."""

from hessfunc.kronecker.backpropagation_rules import (
    by_autodiff,
    elementwise,
    linear,
    piecewise_linear,
    reshaped,
    rule,
    rule_of,
    selection,
)
from hessfunc.kronecker.block import Block
from hessfunc.kronecker.block_error import BlockError, error
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.composite_blocks import DirectSum, Joint, Permuted
from hessfunc.kronecker.factored_blocks import (
    Congruence,
    Dense,
    DiagonalBlock,
    Eigenbasis,
    Kronecker,
)
from hessfunc.kronecker.factors import ekfac, kfac, kflr, kfoc
from hessfunc.kronecker.jacobians import Diagonal, EachExample, Identity, Jacobian, OfAll, Selection
from hessfunc.kronecker.layer import Call, Dependence, General, Layer, SharedWeight
from hessfunc.kronecker.propagate import BlockCurvature, hbp
from hessfunc.kronecker.recursive import kfra
from hessfunc.transforms.exact_blocks import exact_blocks

__all__ = [
    "hbp",
    "kfra",
    "kflr",
    "kfac",
    "ekfac",
    "kfoc",
    "exact_blocks",
    "BlockCurvature",
    "Blocks",
    "error",
    "BlockError",
    # Kinds of blocks
    "Block",
    "Dense",
    "DiagonalBlock",
    "Kronecker",
    "Eigenbasis",
    "Congruence",
    "Permuted",
    "Joint",
    "DirectSum",
    # Rules for modules, and the classes that they use
    "rule",
    "rule_of",
    "elementwise",
    "piecewise_linear",
    "linear",
    "reshaped",
    "selection",
    "by_autodiff",
    "Call",
    "Layer",
    "Jacobian",
    "Identity",
    "OfAll",
    "Diagonal",
    "Selection",
    "EachExample",
    "Dependence",
    "SharedWeight",
    "General",
]
