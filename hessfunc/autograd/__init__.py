"""Evaluation of losses so that they can be differentiated twice."""

from hessfunc.autograd.contexts import (
    differentiable_twice,
    kept_batch,
    plain_batch,
    precise,
    refuse_autocast,
    rereading,
)
from hessfunc.autograd.errors import explained, explanation, lacks_forward_mode

__all__ = [
    "differentiable_twice",
    "explained",
    "explanation",
    "kept_batch",
    "lacks_forward_mode",
    "plain_batch",
    "precise",
    "refuse_autocast",
    "rereading",
]
