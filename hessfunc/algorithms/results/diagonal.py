"""Estimate of a diagonal, with standard errors entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hessfunc.algorithms.results.estimate import Estimate, LeafEstimate
from hessfunc.algorithms.results.result import Result
from hessfunc.algorithms.statistics import chi_squared_quantile, refuse_level, student_quantile
from hessfunc.display import VECTORS
from hessfunc.options import validated
from hessfunc.spaces.leaf_names import names_of
from hessfunc.trees import Tree, flatten, leaves, tree_map


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalEstimate(Result):
    """Estimate of one number per entry of a tree, with standard errors.

    Attributes:
        value: Tree of estimates.
        stderr: Tree of the standard errors of the estimates.
        degrees: Degrees of freedom with which the standard errors are known.
        squared_row_norms: Estimate of ``sum_k a_jk^2`` for each row j of the same matrix, from the
            same products, or None.
        by_leaf: Sums of the entries of each leaf, by name; empty if they were not computed. Each is
            a `LeafEstimate`, a float with ``stderr`` and ``interval(level)``.
        leaf_stderr: Standard errors of the sums in ``by_leaf``, by name.
        sum_of_squares: Unbiased estimate of the sum of the squared entries, with the sum over each
            leaf, or None.
    """

    value: Tree = field(metadata=VECTORS)
    stderr: Tree = field(metadata=VECTORS)
    degrees: int
    squared_row_norms: DiagonalEstimate | None = None
    by_leaf: Mapping[str, float] = field(default_factory=dict)
    leaf_stderr: Mapping[str, float] = field(default_factory=dict)
    sum_of_squares: Estimate | None = None

    def __post_init__(self) -> None:
        parts = {
            name: LeafEstimate(part, self.leaf_stderr.get(name, math.nan), self.degrees)
            for name, part in self.by_leaf.items()
        }
        object.__setattr__(self, "by_leaf", parts)

    def _headline(self) -> dict[str, object]:
        entries = sum(leaf.numel() for leaf in leaves(self.value))
        return {"entries": entries, "relative_error": f"{self.relative_error():.2g}"}

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        # One row for each entry, in the order of the flattened leaves.
        entries, structure = flatten(self.value)
        names, sizes = names_of(structure), [leaf.numel() for leaf in entries]
        value, stderr, low, high = (
            [x for leaf in leaves(tree) for x in leaf.double().flatten().tolist()]
            for tree in (self.value, self.stderr, *self.interval())
        )
        return {
            "leaf": [name for name, size in zip(names, sizes, strict=True) for _ in range(size)],
            "entry": [i for size in sizes for i in range(size)],
            "value": value,
            "stderr": stderr,
            "low": low,
            "high": high,
        }

    @validated
    def interval(self, level: float = 0.95) -> tuple[Tree, Tree]:
        """Return the two-sided Student intervals, entry by entry.

        Each interval holds with probability ``level`` on its own, not all of them at once.

        Args:
            level: Confidence level, in (0, 1).

        Returns:
            Trees of the lower and of the upper ends.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        refuse_level(level)
        t = student_quantile((1 + level) / 2, self.degrees)
        # An exact entry has a width of 0, also where the quantile is infinite.
        half = tree_map(lambda error: torch.where(error == 0, error, t * error), self.stderr)
        lower = tree_map(lambda value, width: value - width, self.value, half)
        upper = tree_map(lambda value, width: value + width, self.value, half)
        return lower, upper

    @validated
    def relative_error(self, level: float = 0.95) -> float:
        """Return an upper bound of ``|error|_2 / |value|_2`` over all entries.

        The bound is 0 if all standard errors are 0, and otherwise infinite if all values are 0.

        The squared error of the whole diagonal is approximately a scaled chi-squared variable of
        nu = (sum stderr^2)^2 / sum stderr^4 degrees of freedom, so it is close to its mean:

            |error|_2^2 <= sum stderr^2 q / nu,  q = the chi-squared quantile of nu degrees,

        with nu halved, since entries share their probes.

        Args:
            level: Probability with which the bound holds, in (0, 1).

        Raises:
            ValueError: If the level is not in (0, 1).

        Source: Satterthwaite 1946.
        """
        refuse_level(level)
        size = _power_sum(self.value, 2) ** 0.5
        error = _power_sum(self.stderr, 2)
        if error == 0:
            return 0.0
        if not size > 0 or math.isinf(error):
            return math.inf
        terms = error**2 / _power_sum(self.stderr, 4) / 2
        return math.sqrt(error * chi_squared_quantile(level, terms) / terms) / size


def close_enough(estimate: DiagonalEstimate, rtol: float | None, /) -> str | None:
    """Return the reason for which a diagonal need not be refined, or None."""
    if rtol is not None and estimate.relative_error() <= rtol:
        return "converged: the error in the 2-norm is within the tolerance, with 95 % confidence"
    return None


def _power_sum(tree: Tree, power: int) -> float:
    """Return the sum of a power of all entries, in float64."""
    return float(sum(leaf.double().pow(power).sum() for leaf in leaves(tree)))
