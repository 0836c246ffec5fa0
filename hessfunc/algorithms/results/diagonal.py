"""A diagonal with its standard error, entry by entry."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hessfunc.algorithms.results.result import Result
from hessfunc.algorithms.statistics import chi_squared_quantile, student_quantile
from hessfunc.options import validated
from hessfunc.trees import Tree, leaves, tree_map


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalEstimate(Result):
    """One number for each entry of a tree, with its standard error.

    Attributes:
        value: a tree of estimates.
        stderr: a tree of their standard errors.
        degrees: of freedom, with which the standard errors are themselves known.
        squared_row_norms: of the same matrix, ``sum_k a_jk^2`` for each row j, where the same
            products tell them.
    """

    value: Tree
    stderr: Tree
    degrees: int
    squared_row_norms: DiagonalEstimate | None = None

    def _headline(self) -> dict[str, object]:
        entries = sum(leaf.numel() for leaf in leaves(self.value))
        return {"entries": entries, "relative_error": f"{self.relative_error():.2g}"}

    @validated
    def interval(self, level: float = 0.95) -> tuple[Tree, Tree]:
        """The two-sided Student intervals at this level, entry by entry: two trees.

        Each holds with this probability, not all of them at once.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: a probability between 0 and 1")
        t = student_quantile((1 + level) / 2, self.degrees)
        lower = tree_map(lambda value, stderr: value - t * stderr, self.value, self.stderr)
        upper = tree_map(lambda value, stderr: value + t * stderr, self.value, self.stderr)
        return lower, upper

    @validated
    def relative_error(self, level: float = 0.95) -> float:
        """Return a bound of ``|error|_2 / |value|_2`` over all entries.

        It is 0 where every standard error is 0, and otherwise infinite where every value is 0.

        The squared error of the whole diagonal is a sum of as many independent terms as entries
        have a share in it, nu = (sum stderr^2)^2 / sum stderr^4, and so close to its mean:

            |error|_2^2 <= sum stderr^2 q / nu,  q = the chi-squared quantile of nu degrees,

        with nu halved, since entries share their probes.

        Source: Satterthwaite 1946.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: a probability between 0 and 1")
        size = _power_sum(self.value, 2) ** 0.5
        error = _power_sum(self.stderr, 2)
        if error == 0:
            return 0.0
        if not size > 0 or math.isinf(error):
            return math.inf
        terms = error**2 / _power_sum(self.stderr, 4) / 2
        return math.sqrt(error * chi_squared_quantile(level, terms) / terms) / size


def close_enough(estimate: DiagonalEstimate, rtol: float | None, /) -> str | None:
    """Return why a diagonal need not be refined, in words, or None."""
    if rtol is not None and estimate.relative_error() <= rtol:
        return "converged: the error in the 2-norm is within the tolerance, with 95 % confidence"
    return None


def settled(estimate: DiagonalEstimate, rtol: float | None, /) -> DiagonalEstimate:
    """Return the last estimate of a run, which has converged if and only if it is close enough."""
    reason = close_enough(estimate, rtol)
    if reason is None or estimate.reason == reason:
        return estimate
    if estimate.reason.startswith("exact"):
        reason = f"{reason} ({estimate.reason})"
    return replace(estimate, reason=reason)


def _power_sum(tree: Tree, power: int) -> float:
    return float(sum(leaf.double().pow(power).sum() for leaf in leaves(tree)))
