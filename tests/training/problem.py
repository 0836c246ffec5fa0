"""Small images, and a net with statistics and draws."""

from __future__ import annotations

import torch
from torch import nn

from hessfunc.training.examples import Examples


def images(count: int = 50) -> Examples:
    generator = torch.Generator().manual_seed(0)
    return Examples(
        torch.randn(count, 1, 8, 8, generator=generator),
        torch.randint(10, (count,), generator=generator),
    )


def small_net() -> nn.Sequential:
    """With statistics and draws."""
    return nn.Sequential(
        nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)
    )
