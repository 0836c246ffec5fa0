"""A diagonal with its standard error, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hessfunc.algorithms.quantiles import student_quantile
from hessfunc.algorithms.results.result import Result
from hessfunc.trees import Tree, leaves, tree_map

__all__ = ["DiagonalEstimate"]


@dataclass(frozen=True, kw_only=True)
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

    def relative_error(self, level: float = 0.95) -> float:
        """The half-widths of the intervals over the values, both in the 2-norm.

        About the relative error of the whole diagonal; infinite where all values are zero.
        """
        t = student_quantile((1 + level) / 2, self.degrees)
        size = _norm(self.value)
        return t * _norm(self.stderr) / size if size > 0 else float("inf")


def _norm(tree: Tree) -> float:
    return float(torch.stack([leaf.double().square().sum() for leaf in leaves(tree)]).sum().sqrt())
