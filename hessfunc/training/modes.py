"""The mode of a model, for a while."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from hessfunc.functional import training_flags

__all__ = ["eval_mode"]


def eval_mode(model: nn.Module, /) -> AbstractContextManager[None]:
    """Inside, the model is in eval mode; afterwards each of its modules is as it was."""
    return training_flags([(module, False) for module in model.modules()])
