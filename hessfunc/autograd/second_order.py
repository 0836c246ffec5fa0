"""Replacements of torch functions for gradients that are differentiated in reverse mode."""

from __future__ import annotations

from torch.nn import functional as F

from hessfunc.autograd.chunked_attention import IN_CHUNKS
from hessfunc.autograd.convolution import convolution
from hessfunc.autograd.corrections import EXACT
from hessfunc.autograd.elementwise import ELEMENTWISE, elementwise, gelu
from hessfunc.autograd.linear import linear
from hessfunc.autograd.normalisation import batch_norm, layer_norm
from hessfunc.autograd.overrides import Replacements

# Replacements with the values and derivatives of torch, and faster Hessian products.
SECOND_ORDER: Replacements = {
    **EXACT,
    **IN_CHUNKS,
    F.conv1d: convolution(F.conv1d, 1),
    F.conv2d: convolution(F.conv2d, 2),
    F.conv3d: convolution(F.conv3d, 3),
    F.batch_norm: batch_norm,
    F.linear: linear,
    F.layer_norm: layer_norm,
    F.gelu: gelu,
    **{function: elementwise(function) for function in ELEMENTWISE},
}
