"""Attention for a few queries at a time, with derivatives that recompute its weights.

The weights of T queries and T keys have T^2 entries. Here, they exist only for a chunk of queries.
With the logits S = c Q K' + M, the weights P = softmax(S) and sm(P, X) = P (X - sum_j P X):

- The output is O = P V. A cotangent G of it gives A = G V', dS = c sm(P, A), and the gradient
  dQ = dS K, dK = dS' Q, dV = P' G.
- Tangents (a, b, w) of (Q, K, V) move S by N = c (a K' + Q b') and O by sm(P, N) V + P w.
- <G, that tangent of O> is the inner product of the gradient with (a, b, w). Its gradient is the
  second derivative of the gradient: with d = sum_j P A, e = sum_j P N and
  dP = N (A - d) - e A + G w', and with X = c sm(P, dP) and Y = c sm(P, A), it is
  Y b + X K for Q, Y' a + X' Q for K, and sm(P, N)' G for V.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.attention import math_attention
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

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]
Parts: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


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
        repeats = query.shape[-3] // key.shape[-3]
        k, v = (x.repeat_interleave(repeats, -3) for x in (k, v))
    if k.shape[:-2] != q.shape[:-2] or v.shape[:-2] != q.shape[:-2]:
        return math_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = Options(factor, is_causal, _chunk(query, key))
    out: Tensor = _Outputs.apply(weights, q, k, v, _added(attn_mask, q))  # type: ignore[no-untyped-call]
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


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask as a term of the logits."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        hidden = mask.logical_not()
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(hidden, -math.inf)
    return (mask if mask.dim() > 1 else mask[None]).to(query.dtype)


def _chunk(query: Tensor, key: Tensor) -> int:
    """Return the number of queries of a chunk."""
    of_one_query = max(1, math.prod(query.shape[:-2]) * key.shape[-2])
    return max(_FEWEST, _ENTRIES // of_one_query)


@dataclass(frozen=True)
class Options:
    """Options of the attention weights.

    Attributes:
        factor: Factor c of the logits.
        causal: Whether query i attends to the keys up to i only.
        size: Number of queries of a chunk.
    """

    factor: float
    causal: bool
    size: int


@dataclass(frozen=True)
class Chunk:
    """Queries with the keys that they attend to.

    Attributes:
        factor: Factor c of the logits.
        q: Queries.
        k: Keys.
        v: Values.
        p: Weights P.
        rows: Slice of the queries.
        columns: Slice of the keys.
    """

    factor: float
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    rows: slice
    columns: slice

    def centred(self, x: Tensor, /) -> Tensor:
        """Return sm(P, x)."""
        return self.p * (x - _row_means(self.p, x))

    def tangent(self, a: Tensor | None, b: Tensor | None, /) -> Tensor | None:
        """Return N = c (a K' + Q b') for tangents of all queries and all keys."""
        terms = [
            None if a is None else a[..., self.rows, :] @ self.k.mT,
            None if b is None else self.q @ b[..., self.columns, :].mT,
        ]
        given = [term for term in terms if term is not None]
        return self.factor * sum(given[1:], given[0]) if given else None

    def moved(self, n: Tensor | None, w: Tensor | None, /) -> Tensor:
        """Return the tangent sm(P, N) V + P w of the outputs, for tangents of all values."""
        terms = [
            None if n is None else self.centred(n) @ self.v,
            None if w is None else self.p @ w[..., self.columns, :],
        ]
        given = [term for term in terms if term is not None]
        return sum(given[1:], given[0])


@dataclass(frozen=True)
class Attention:
    """Attention of given queries, keys and values.

    Attributes:
        options: Options of the weights.
        query: Queries Q, ``[..., T, d]``.
        key: Keys K, ``[..., U, d]``.
        value: Values V, ``[..., U, v]``.
        mask: Constant M that is added to the logits, or None.
    """

    options: Options
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks of queries, with the keys that they attend to."""
        options, mask = self.options, self.mask
        queries, keys = self.query.shape[-2], self.key.shape[-2]
        for start in range(0, queries, options.size):
            rows = slice(start, min(start + options.size, queries))
            columns = slice(0, min(rows.stop, keys) if options.causal else keys)
            q, k = self.query[..., rows, :], self.key[..., columns, :]
            logits = options.factor * (q @ k.mT)
            if options.causal:
                after = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
                logits = logits.masked_fill(after.triu(start + 1), -math.inf)
            if mask is not None:
                here = mask if mask.shape[-2] == 1 else mask[..., rows, :]
                logits = logits + (here if here.shape[-1] == 1 else here[..., columns])
            v = self.value[..., columns, :]
            # The weights of a query that attends to no key are zero, as in torch.
            weights = torch.ops.aten._safe_softmax(logits, -1)
            yield Chunk(options.factor, q, k, v, weights, rows, columns)

    def outputs(self) -> Tensor:
        """Return O."""
        return torch.cat([c.p @ c.v for c in self.chunks()], -2)

    def gradient(self, g: Tensor, /) -> Triple:
        """Return dQ, dK and dV for the cotangent G."""
        of_query: list[Tensor] = []
        of_key, of_value = _Sum(self.key), _Sum(self.value)
        for c in self.chunks():
            here = g[..., c.rows, :]
            slope = c.factor * c.centred(here @ c.v.mT)
            of_query.append(slope @ c.k)
            of_key.add(c.columns, slope.mT @ c.q)
            of_value.add(c.columns, c.p.mT @ here)
        return torch.cat(of_query, -2), of_key.total, of_value.total

    def pushed(self, tangents: Sequence[Parts], /) -> list[Tensor]:
        """Return the tangents of O along tangents of Q, K and V."""
        moved: list[list[Tensor]] = [[] for _ in tangents]
        for c in self.chunks():
            for i, (a, b, w) in enumerate(tangents):
                moved[i].append(c.moved(c.tangent(a, b), w))
        return [torch.cat(parts, -2) for parts in moved]

    def second_derivative(
        self, g: Tensor, tangents: Sequence[Parts], /
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return the derivative of <G, tangent of O> by G, Q, K and V, for each tangent."""
        sums = [(_Sum(self.key), _Sum(self.value)) for _ in tangents]
        rows: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in tangents]
        for c in self.chunks():
            here = g[..., c.rows, :]
            centred = here @ c.v.mT
            centred = centred - _row_means(c.p, centred)
            slope = c.factor * (c.p * centred)
            for i, (a, b, w) in enumerate(tangents):
                (of_g, of_query), (of_key, of_value) = rows[i], sums[i]
                n = c.tangent(a, b)
                of_g.append(c.moved(n, w))
                of_weights = None if w is None else here @ w[..., c.columns, :].mT
                if n is not None:
                    # N (A - d) - e A differs from (N - e) (A - d) by e d, which is constant in each
                    # row, and sm(P, .) removes constants of rows.
                    n = n - _row_means(c.p, n)
                    of_value.add(c.columns, (c.p * n).mT @ here)
                    of_weights = n * centred if of_weights is None else of_weights + n * centred
                assert of_weights is not None
                x = c.factor * c.centred(of_weights)
                along_query, along_key = x @ c.k, x.mT @ c.q
                if b is not None:
                    along_query = along_query + slope @ b[..., c.columns, :]
                if a is not None:
                    along_key = along_key + slope.mT @ a[..., c.rows, :]
                of_query.append(along_query)
                of_key.add(c.columns, along_key)
        return [
            (torch.cat(of_g, -2), torch.cat(of_query, -2), of_key.total, of_value.total)
            for (of_g, of_query), (of_key, of_value) in zip(rows, sums, strict=True)
        ]


class _Sum:
    """Sum of parts of a tensor whose second but last axis they cover up to some place."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)

    def add(self, columns: slice, part: Tensor) -> None:
        if torch.is_grad_enabled() or is_wrapped(part):
            self.total = self.total + F.pad(part, (0, 0, 0, self.total.shape[-2] - columns.stop))
        else:
            self.total[..., columns, :] += part


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


def _row_means(p: Tensor, x: Tensor) -> Tensor:
    """Return the mean of each row of x with weights p."""
    return torch.linalg.vecdot(p, x).unsqueeze(-1)


IN_CHUNKS: Replacements = {F.scaled_dot_product_attention: attention}
