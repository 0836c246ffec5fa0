"""Record how an activation was computed, so that a following layer can be fused with it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessfunc.autograd.bilinear import Bilinear


@dataclass(frozen=True)
class Source:
    """Affine map y = form(x, w) + b that computed an activation y."""

    form: Bilinear
    x: Tensor
    w: Tensor
    b: Tensor | None


def remember(y: Tensor, source: Source, /) -> None:
    """Record the source of y until y is destroyed."""
    key = id(y)
    _sources[key] = _Kept(source, y.grad_fn, _versions(y, source))
    weakref.finalize(y, _sources.pop, key, None)


def source_of(y: Tensor, /) -> Source | None:
    """Return the recorded source of y if derivatives may bypass y, else None.

    The tensors and the graph must not have changed since. No hook or ``retain_grad`` may wait for
    a gradient at y, because the fused layer sends none there.
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


# Keys are ids, because `==` of tensors is elementwise.
_sources: dict[int, _Kept] = {}


def _versions(y: Tensor, source: Source) -> list[int]:
    tensors = (y, source.x, source.w, source.b)
    return [t._version for t in tensors if t is not None]
