"""Attention by products and a softmax, which has derivatives of every order.

The fused kernels have no second derivative. Calling the unfused kernel changes no setting of the
process, unlike `torch.nn.attention.sdpa_kernel`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.overrides import Replacements


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return attention as the backend ``SDPBackend.MATH`` computes it, and its weights."""
    attn_mask = None if attn_mask is None else added_to_logits(attn_mask, query.dtype)
    device = query.device.type
    kernel: Any = torch.ops.aten._scaled_dot_product_attention_math
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if not torch.is_autocast_enabled(device):
        pair: tuple[Tensor, Tensor] = kernel(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )
        return pair
    # Autocast rounds the arguments of the whole operation, not those of its parts.
    dtype = torch.get_autocast_dtype(device)
    rounded = [x.to(dtype) for x in (query, key, value)]
    if attn_mask is not None:
        attn_mask = attn_mask.to(dtype)
    with torch.autocast(device, enabled=False):
        pair = kernel(*rounded, attn_mask, dropout_p, is_causal, **options)
    return pair


def added_to_logits(mask: Tensor, dtype: torch.dtype, /) -> Tensor:
    """Return a mask as a term of the logits: -inf for a pair that a boolean mask hides."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), -math.inf)


def for_each_query_head(x: Tensor, query: Tensor, /) -> Tensor:
    """Repeat keys or values, which groups of query heads share, for each head of the queries."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention`` without a fused kernel."""
    if query.is_nested:
        fused: Any = F.scaled_dot_product_attention
        nested: Tensor = fused(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return nested
    return attended(query, key, value, attn_mask, is_causal, dropout_p=dropout_p, **options)[0]


ATTENTION: Replacements = {F.scaled_dot_product_attention: math_attention}
