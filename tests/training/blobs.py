"""A small problem of two classes."""

import torch

from hessfunc.training.examples import Examples


def blobs(count: int = 60) -> Examples:
    """Told apart by the sign of the first coordinate."""
    inputs = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return Examples(inputs, (inputs[:, 0] > 0).long())
