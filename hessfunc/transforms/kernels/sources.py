"""From what an activation was computed, for a layer after it that can be made one with it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from hessfunc.transforms.kernels.bilinear import Layer

__all__ = ["Source", "remember", "source_of"]


@dataclass(frozen=True)
class Source:
    """y = form(x, w) + b."""

    form: Layer
    x: Tensor
    w: Tensor
    b: Tensor | None


# By id, as tensors have no equality; with the version of y.
_sources: dict[int, tuple[int, Source]] = {}


def remember(y: Tensor, source: Source, /) -> None:
    """Keep the source of y for as long as y lives."""
    key = id(y)
    _sources[key] = y._version, source
    weakref.finalize(y, _sources.pop, key, None)


def source_of(y: Tensor, /) -> Source | None:
    """What `remember` kept, if y has not changed since."""
    version, source = _sources.get(id(y), (-1, None))
    return source if version == y._version else None
