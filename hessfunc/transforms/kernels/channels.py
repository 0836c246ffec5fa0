"""Scales of channels, as bilinear maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hessfunc.transforms.kernels.bilinear import Bilinear

__all__ = ["Channels"]


@dataclass(frozen=True)
class Channels(Bilinear):
    """y = x with its channel c, of the second axis of ``axes``, times w_c."""

    axes: int

    @property
    def dims(self) -> int:
        return self.axes

    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        return x * self.spread(w)

    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        return g * self.spread(w)

    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        return self.gathered(g * x)
