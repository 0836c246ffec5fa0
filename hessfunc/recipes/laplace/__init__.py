"""Laplace approximation: a normal posterior of the parameters around a trained network."""

from hessfunc.recipes.laplace.fit import laplace
from hessfunc.recipes.laplace.posterior import Posterior
from hessfunc.recipes.laplace.predictive import Predictive

__all__ = ["laplace", "Posterior", "Predictive"]
