"""Estimate of a number with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.algorithms.statistics import anytime_quantile, refuse_level, student_quantile
from hessfunc.display import Achieved, Displayed
from hessfunc.options import flag, validated
from hessfunc.spaces.space import Space

Confidence: TypeAlias = Literal["fixed", "anytime"]
Found = TypeVar("Found", bound="Estimate")

WITHIN = "converged: the half-width of the 95 % interval is within the tolerance"


class LeafEstimate(Displayed, float):
    """Contribution of one leaf to an estimate: a float with a standard error.

    Attributes:
        stderr: Standard error of the contribution, NaN if it is not known.
        degrees: Degrees of freedom with which the standard error is known.
        confidence: ``"anytime"`` if the intervals at all numbers of probes hold together, else
            ``"fixed"``.
    """

    stderr: float
    degrees: int
    confidence: Confidence

    __slots__ = ("confidence", "degrees", "stderr")

    def __new__(
        cls, value: float, stderr: float, degrees: int, confidence: Confidence = "fixed"
    ) -> LeafEstimate:
        made = super().__new__(cls, value)
        object.__setattr__(made, "stderr", stderr)
        object.__setattr__(made, "degrees", degrees)
        object.__setattr__(made, "confidence", confidence)
        return made

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a LeafEstimate is frozen: {name} cannot be set")

    def __getnewargs__(self) -> tuple[float, float, int, Confidence]:  # type: ignore[override]
        return float(self), self.stderr, self.degrees, self.confidence

    def __getstate__(self) -> None:
        """Return None: pickles and copies are made from the arguments of `__new__` alone."""

    def __repr__(self) -> str:
        return f"LeafEstimate({float(self):.6g}, stderr={self.stderr:.2g})"

    def _headline(self) -> dict[str, object]:
        low, high = self.interval()
        return {"value": f"{self.value:.6g}", "interval": f"[{low:.6g}, {high:.6g}]"}

    @validated(vectors=flag)
    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return the value, its standard error and the degrees of freedom as plain Python.

        Args:
            vectors: Accepted as for other results; a number has no vectors.
        """
        fields = {"value": self.value, "stderr": self.stderr, "degrees": self.degrees}
        return {"kind": "LeafEstimate", **fields}

    @property
    def value(self) -> float:
        """Contribution of the leaf as a plain float."""
        return float(self)

    @validated
    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the two-sided interval of this contribution on its own, as `Estimate.interval`.

        Args:
            level: Confidence level, in (0, 1).

        Returns:
            Lower and upper end.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        half = _half_width(self.stderr, self.degrees, level, self.confidence)
        return float(self) - half, float(self) + half


def _half_width(
    stderr: float, degrees: int, level: float, confidence: Confidence = "fixed"
) -> float:
    """Return the half-width of a two-sided interval, 0 for a standard error of 0."""
    refuse_level(level)
    if not stderr:
        return 0.0
    if confidence == "anytime":
        return anytime_quantile(level, degrees) * stderr
    return student_quantile((1 + level) / 2, degrees) * stderr


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Result):
    """Estimate of a number with its standard error.

    Attributes:
        value: Estimate.
        stderr: Standard error of the value.
        degrees: Degrees of freedom with which the standard error is known.
        samples: Samples of the value, one per probe, float64 ``(p,)``.
        by_leaf: Contributions of the leaves by name, which sum to the value. Each is a
            `LeafEstimate`, a float with ``stderr`` and ``interval(level)``.
        leaf_stderr: Standard errors of the contributions in ``by_leaf``, by name.
        leaf_shapes: Shapes of the leaves of the matrix's vectors, by name; empty if unknown.
        n: Dimension of the matrix, or None if unknown.
        bounds: Lower and upper bound of the value for the probes of this run, if the value has an
            error besides that of the probes, such as a quadrature error; else None. The interval
            contains both bounds.
        squared_frobenius: Estimate of ``|A|_F^2`` of the same matrix from the same products, or
            None.
        seeds: Seeds of the pooled estimates; empty for a single estimate.
        confidence: ``"anytime"`` if the intervals at all numbers of probes hold together, else
            ``"fixed"``.
    """

    value: float
    stderr: float
    degrees: int
    samples: Tensor
    by_leaf: Mapping[str, float]
    leaf_stderr: Mapping[str, float] = field(default_factory=dict)
    leaf_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    n: int | None = None
    bounds: tuple[float, float] | None = None
    squared_frobenius: Estimate | None = None
    seeds: Sequence[int] = ()
    confidence: Confidence = "fixed"

    def __post_init__(self) -> None:
        parts = {
            name: LeafEstimate(
                part, self.leaf_stderr.get(name, math.nan), self.degrees, self.confidence
            )
            for name, part in self.by_leaf.items()
        }
        object.__setattr__(self, "by_leaf", parts)

    def _headline(self) -> dict[str, object]:
        low, high = self.interval()
        return {"value": f"{self.value:.6g}", "interval": f"[{low:.6g}, {high:.6g}]"}

    def achieved(self) -> Achieved:
        low, high = self.interval()
        return Achieved(value=self.value, half_width=(high - low) / 2)

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        # The whole comes first, then its parts if there are several.
        parts = {name: part for name, part in self.by_leaf.items() if len(self.by_leaf) > 1}
        rows = [("total", self.value, self.stderr, *self.interval())]
        for name, part in parts.items():
            assert isinstance(part, LeafEstimate)
            rows.append((name, part.value, part.stderr, *part.interval()))
        names = ("leaf", "value", "stderr", "low", "high")
        return dict(zip(names, zip(*rows, strict=True), strict=True))

    @validated
    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the two-sided Student interval of the value, or that of a confidence sequence.

        With ``confidence="anytime"``, the intervals at all numbers of probes contain the value
        together with the probability ``level``, however a run was stopped. Without, the probability
        is that of one interval.

        Args:
            level: Confidence level, in (0, 1).

        Returns:
            Lower and upper end.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        half = _half_width(self.stderr, self.degrees, level, self.confidence)
        low, high = self.bounds or (self.value, self.value)
        return low - half, high + half


def leaf_fields(space: Space, parts: Tensor, stderr: Sequence[float], /) -> dict[str, Any]:
    """Return the fields of an `Estimate` that describe the contributions of its leaves.

    Args:
        space: Vector space of the matrix.
        parts: Contribution of each leaf, ``(leaves,)``.
        stderr: Standard error of each contribution.
    """
    return {
        "by_leaf": dict(zip(space.names, parts.tolist(), strict=True)),
        "leaf_stderr": dict(zip(space.names, stderr, strict=True)),
        "leaf_shapes": dict(zip(space.names, map(list, space.shapes), strict=True)),
        "n": space.n,
    }


def scaled(estimate: Estimate, factor: float, /) -> Estimate:
    """Return the estimate of a positive multiple of a number without parts of leaves.

    Args:
        estimate: Estimate of the number.
        factor: Positive factor.
    """
    low, high = estimate.bounds or (estimate.value, estimate.value)
    return replace(
        estimate,
        value=factor * estimate.value,
        stderr=factor * estimate.stderr,
        samples=factor * estimate.samples,
        bounds=(factor * low, factor * high),
    )


def narrow_enough(estimate: Estimate, rtol: float | None, atol: float | None, /) -> str | None:
    """Return the reason for which an estimate need not be refined, or None."""
    if rtol is None and atol is None:
        return None
    low, high = estimate.interval()
    if (high - low) / 2 <= max((rtol or 0.0) * abs(estimate.value), atol or 0.0):
        return WITHIN
    return None
