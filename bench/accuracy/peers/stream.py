"""torch's own random stream, for libraries that draw from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.accuracy.questions import Products
from hessfunc.randomness import seeded


@contextmanager
def stream(products: Products, seed: int) -> Iterator[None]:
    """Inside, torch's own stream starts at the seed, and new tensors have the matrix's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(products.matrix.dtype)
    try:
        with seeded(seed):
            yield
    finally:
        torch.set_default_dtype(before)
