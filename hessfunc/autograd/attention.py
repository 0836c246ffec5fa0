"""Attention by products and a softmax, which has derivatives of every order.

The fused kernels have no second derivative. Calling the unfused kernel changes no setting of the
process, unlike `torch.nn.attention.sdpa_kernel`.
"""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.overrides import Replacements


def _math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention`` as its backend ``SDPBackend.MATH`` does."""
    if query.is_nested:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = attn_mask.logical_not()
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(hidden, -math.inf)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Autocast rounds the arguments of the whole operation, not those of its parts.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
        with torch.autocast(device, enabled=False):
            return _math_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
    kernel: Any = torch.ops.aten._scaled_dot_product_attention_math
    attended: Tensor = kernel(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return attended


def _never_overridden(tensors: Any) -> bool:
    return False


def _rebound(function: Any, **names: Any) -> Any:
    """Return a function with the same body that sees other objects under some global names."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# A mode is inactive while it handles a call, so the attention inside would be the fused one.
_multi_head_attention = _rebound(
    F.multi_head_attention_forward,
    has_torch_function=_never_overridden,
    scaled_dot_product_attention=_math_attention,
)

ATTENTION: Replacements = {
    F.scaled_dot_product_attention: _math_attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
