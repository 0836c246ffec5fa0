"""Initial weights of normal distribution."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["xavier"]

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def xavier(model: AnyModule) -> AnyModule:
    """The same model, its weights drawn anew from torch's stream, and its biases zero.

        w ~ N(0, 2 / (fan_in + fan_out))

    Source: Glorot and Bengio 2010.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
