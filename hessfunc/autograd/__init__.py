"""Evaluation of losses so that they can be differentiated twice."""

from hessfunc.autograd.contexts import (
    differentiable_twice,
    plain_batch,
    precise,
    refuse_autocast,
    same_draws,
)
from hessfunc.autograd.errors import explained, explanation

__all__ = [
    "differentiable_twice",
    "explained",
    "explanation",
    "plain_batch",
    "precise",
    "refuse_autocast",
    "same_draws",
]
