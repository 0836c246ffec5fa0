"""What a loss is computed with, where it is to be differentiated twice."""

from hessfunc.transforms.kernels.surroundings import (
    differentiable_twice,
    explained,
    explanation,
    precise,
    same_draws,
)

__all__ = ["differentiable_twice", "explained", "explanation", "precise", "same_draws"]
