"""Models and batches on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hessfunc.trees import tree_map

__all__ = ["Placed", "device_of", "on_one_device"]


def on_one_device(model: nn.Module, /) -> nn.Module:
    """The model itself, or the one that a ``DataParallel`` spreads."""
    return model.module if isinstance(model, nn.DataParallel) else model


def device_of(model: nn.Module, /) -> torch.device:
    """Where the parameters lie."""
    return next(model.parameters()).device


@dataclass(frozen=True)
class Placed:
    """Batches that are brought to a device one by one."""

    batches: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield tree_map(lambda leaf: leaf.to(self.device), batch)
