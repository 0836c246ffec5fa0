"""Results of algorithms: estimates with their uncertainty, their cost and the reason to stop."""

from hessfunc.algorithms.results.check import Check
from hessfunc.algorithms.results.density import Density
from hessfunc.algorithms.results.diagonal import DiagonalEstimate
from hessfunc.algorithms.results.eigenpairs import Eigenpairs
from hessfunc.algorithms.results.estimate import (
    Estimate,
    LeafEstimate,
)
from hessfunc.algorithms.results.implicit_gradient import ImplicitGradient
from hessfunc.algorithms.results.influence import Influence, SelfInfluence
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.algorithms.results.matrix_function import MatrixFunction
from hessfunc.algorithms.results.overlap import Overlap
from hessfunc.algorithms.results.pool import pool
from hessfunc.algorithms.results.result import Result, load
from hessfunc.algorithms.results.sampled import SampledEstimate
from hessfunc.algorithms.results.sharpness import GeneralizedSharpness, Sharpness
from hessfunc.algorithms.results.solution import Solution
from hessfunc.display import Progress

__all__ = [
    "Result",
    "Eigenpairs",
    "Estimate",
    "LeafEstimate",
    "SampledEstimate",
    "DiagonalEstimate",
    "Density",
    "Solution",
    "MatrixFunction",
    "ImplicitGradient",
    "Influence",
    "SelfInfluence",
    "Landscape",
    "GeneralizedSharpness",
    "Sharpness",
    "Check",
    "Overlap",
    "Progress",
    "load",
    "pool",
]
