"""What a loss is computed with, where it is to be differentiated twice."""

from hessfunc.transforms.kernels.surroundings import (
    differentiable_twice,
    explained,
    explanation,
    kept_batch,
    lacks_forward_mode,
    plain_batch,
    precise,
    refuse_autocast,
    same_draws,
)

__all__ = [
    "differentiable_twice",
    "explained",
    "explanation",
    "kept_batch",
    "lacks_forward_mode",
    "plain_batch",
    "precise",
    "refuse_autocast",
    "same_draws",
]
