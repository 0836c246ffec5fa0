"""Seeds for scripts that call ``torch.manual_seed``."""

from __future__ import annotations

import torch

__all__ = ["seed_of_stream"]


def seed_of_stream() -> int:
    """A seed drawn from torch's random stream."""
    return int(torch.randint(2**62, (), device="cpu"))
