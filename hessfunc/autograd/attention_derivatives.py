"""First and second derivatives of attention, for a few queries at a time.

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
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.functorch import is_wrapped

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]


Parts: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


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


def _row_means(p: Tensor, x: Tensor) -> Tensor:
    """Return the mean of each row of x with weights p."""
    return torch.linalg.vecdot(p, x).unsqueeze(-1)
