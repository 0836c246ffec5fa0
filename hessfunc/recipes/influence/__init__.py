"""Influence of training examples: scores for queries, and for the examples themselves."""

from hessfunc.recipes.influence.pairwise import influence
from hessfunc.recipes.influence.self_scores import self_influence

__all__ = ["influence", "self_influence"]
