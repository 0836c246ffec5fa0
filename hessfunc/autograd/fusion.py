"""From what an activation was computed, for a layer after it that can be made one with it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessfunc.autograd.bilinear import Bilinear


@dataclass(frozen=True)
class Source:
    """y = form(x, w) + b."""

    form: Bilinear
    x: Tensor
    w: Tensor
    b: Tensor | None


def remember(y: Tensor, source: Source, /) -> None:
    """Keep the source of y for as long as y lives."""
    key = id(y)
    _sources[key] = _Kept(source, y.grad_fn, _versions(y, source))
    weakref.finalize(y, _sources.pop, key, None)


def source_of(y: Tensor, /) -> Source | None:
    """What `remember` kept, if derivatives of y can be taken by it.

    Nothing may have changed since, in place or in the graph, and nobody may wait for a gradient
    at y, for none will come there.
    """
    kept = _sources.get(id(y))
    if kept is None or kept.made_by is None or y.grad_fn is not kept.made_by:
        return None
    if _versions(y, kept.source) != kept.versions or y._backward_hooks or y.retains_grad:
        return None
    return kept.source


@dataclass(frozen=True)
class _Kept:
    source: Source
    made_by: Any
    versions: list[int]


# By id, as tensors have no equality.
_sources: dict[int, _Kept] = {}


def _versions(y: Tensor, source: Source) -> list[int]:
    tensors = (y, source.x, source.w, source.b)
    return [t._version for t in tensors if t is not None]
