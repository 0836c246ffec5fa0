"""Attention for a few queries at a time, whose derivatives recompute its weights.

The weights of T queries and T keys have T^2 entries. Here, they exist only for a chunk of queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.attention import added_to_logits, for_each_query_head, math_attention
from hessfunc.autograd.attention_derivatives import Attention, Options, Triple
from hessfunc.autograd.functorch import (
    applied,
    is_wrapped,
    on_blocks,
    once_more,
    probes_of,
    transforms_itself,
)
from hessfunc.autograd.overrides import Replacements
from hessfunc.numerics import widened

# Queries times keys below which all weights at once are faster.
_SHORT = 512 * 512
# Most weights that exist at once, and the fewest queries of a chunk.
_ENTRIES = 2**18
_FEWEST = 64


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention`` in memory that is linear in the length.

    Short sequences, random masks, masks that require a gradient, broadcast batches, autocast and
    compiled code keep all weights.
    """
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if not (
        _is_long(query, key)
        and dropout_p == 0
        and (attn_mask is None or not (is_causal or attn_mask.requires_grad))
        and _supports(query, key, value, attn_mask)
    ):
        return math_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    # Narrow numbers are too coarse for the sums of a softmax.
    q, k, v = (widened(x) for x in (query, key, value))
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        k, v = for_each_query_head(k, query), for_each_query_head(v, query)
    if k.shape[:-2] != q.shape[:-2] or v.shape[:-2] != q.shape[:-2]:
        return math_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = Options(factor, is_causal, _chunk(query, key))
    mask = None
    if attn_mask is not None:
        mask = added_to_logits(attn_mask if attn_mask.dim() > 1 else attn_mask[None], q.dtype)
        mask = mask.to(q.dtype)
    out: Tensor = _Outputs.apply(weights, q, k, v, mask)  # type: ignore[no-untyped-call]
    return out.to(query.dtype)


def _is_long(query: Tensor, key: Tensor) -> bool:
    return not query.is_nested and query.shape[-2] * key.shape[-2] > _SHORT


def _supports(*tensors: Tensor | None) -> bool:
    """Return whether the formulas hold in this evaluation.

    torch drops the tangents of outer levels where a custom function has a forward mode. Transforms
    that the loss itself begins therefore need all weights.
    """
    present = [x for x in tensors if x is not None]
    mask, query = tensors[-1], present[0]
    if mask is not None:
        if is_wrapped(mask) or mask.dim() > query.dim():
            return False
        batch = (1,) * (query.dim() - mask.dim()) + tuple(mask.shape[:-2])
        if any(m not in (1, n) for m, n in zip(batch, query.shape[:-2], strict=False)):
            return False
    return not (
        transforms_itself()
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or any(torch.is_autocast_enabled(device) for device in {x.device.type for x in present})
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in present)
        or len({x.dtype for x in present if x.is_floating_point()}) > 1
    )


def _chunk(query: Tensor, key: Tensor) -> int:
    """Return the number of queries of a chunk."""
    of_one_query = max(1, math.prod(query.shape[:-2]) * key.shape[-2])
    return max(_FEWEST, _ENTRIES // of_one_query)


class _Outputs(torch.autograd.Function):
    """Outputs of the attention."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        options: Options, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        return Attention(options, query, key, value, mask).outputs()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        query, key, value, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            moving = once_more(query, key, value)
            return None, *_Gradient.apply(ctx.options, g, *moving, mask), None  # type: ignore[no-untyped-call]
        attention = Attention(ctx.options, query, key, value, mask)

        def along(g: Tensor | None) -> tuple[Tensor, ...]:
            assert g is not None
            if g.dim() == query.dim():
                return attention.gradient(g)
            return _stacked([attention.gradient(one) for one in g])

        return None, *on_blocks(along, g), None

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        a, b, w, _of_mask = tangents
        return Attention(ctx.options, *ctx.saved_tensors).pushed([(a, b, w)])[0]


class _Gradient(torch.autograd.Function):
    """Gradient with respect to queries, keys and values for a cotangent of the outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        options: Options,
        g: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Triple:
        return Attention(options, query, key, value, mask).gradient(g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
        ctx.options = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        g, query, key, value, mask = ctx.saved_tensors
        attention = Attention(ctx.options, query, key, value, mask)
        # A Gauss-Newton matrix needs the derivative with respect to the cotangent only.
        is_linear = not any(ctx.needs_input_grad[2:5])

        def along(*moving: Tensor | None) -> tuple[Tensor | None, ...]:
            blocks = probes_of(moving, (query, key, value))
            if is_linear:
                products = attention.pushed(blocks or [moving])
                return torch.stack(products) if blocks else products[0], None, None, None
            parts = attention.second_derivative(g, blocks or [moving])
            return _stacked(parts) if blocks else parts[0]

        return None, *applied(along, *tangents), None

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Triple:
        g, query, key, value, mask = ctx.saved_tensors
        attention = Attention(ctx.options, query, key, value, mask)
        of_g, a, b, w, _of_mask = tangents
        # The gradient is linear in G, and its derivative by Q, K and V is symmetric.
        parts: list[Triple] = [] if of_g is None else [attention.gradient(of_g)]
        if any(x is not None for x in (a, b, w)):
            parts.append(attention.second_derivative(g, [(a, b, w)])[0][1:])
        first, *others = parts
        return tuple(sum(terms[1:], terms[0]) for terms in zip(first, *others, strict=True))


def _stacked(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(columns) for columns in zip(*parts, strict=True))


IN_CHUNKS: Replacements = {F.scaled_dot_product_attention: attention}
