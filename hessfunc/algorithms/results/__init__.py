"""What every algorithm returns: what was found, how sure, what it cost, and why it stopped."""

from hessfunc.algorithms.results.density import Density
from hessfunc.algorithms.results.diagonal import DiagonalEstimate
from hessfunc.algorithms.results.eigenpairs import Eigenpairs, rounding
from hessfunc.algorithms.results.estimate import Estimate, narrow_enough, pool
from hessfunc.algorithms.results.result import Result, load, versions
from hessfunc.algorithms.results.sampled import SampledEstimate
from hessfunc.algorithms.results.solution import Solution

__all__ = [
    "Result",
    "Eigenpairs",
    "Estimate",
    "SampledEstimate",
    "DiagonalEstimate",
    "Density",
    "Solution",
    "load",
    "pool",
    "narrow_enough",
    "rounding",
    "versions",
]
