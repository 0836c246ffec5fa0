"""The edge of stability."""

from __future__ import annotations

__all__ = ["stability"]


def stability(lr: float, /, *, momentum: float = 0.0) -> float:
    """The curvature above which gradient descent on a quadratic diverges, (2 + 2 momentum) / lr."""
    return (2 + 2 * momentum) / lr
