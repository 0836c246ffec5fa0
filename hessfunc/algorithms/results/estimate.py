"""Estimate of a number with its standard error, and pools of estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.algorithms.statistics import anytime_quantile, refuse_level, student_quantile
from hessfunc.display import Achieved, Displayed
from hessfunc.options import flag, validated
from hessfunc.spaces.space import Space

Confidence: TypeAlias = Literal["fixed", "anytime"]
Found = TypeVar("Found", bound="Estimate")

# Probability with which `pool` refuses estimates that agree, as contradicting each other.
_CHANCE = 1e-9

WITHIN = "converged: the half-width of the 95 % interval is within the tolerance"


class LeafEstimate(Displayed, float):
    """Contribution of one leaf to an estimate: a float with a standard error.

    Attributes:
        stderr: Standard error of the contribution, NaN if it is not known.
        degrees: Degrees of freedom with which the standard error is known.
    """

    stderr: float
    degrees: int

    __slots__ = ("degrees", "stderr")

    def __new__(cls, value: float, stderr: float, degrees: int) -> LeafEstimate:
        made = super().__new__(cls, value)
        object.__setattr__(made, "stderr", stderr)
        object.__setattr__(made, "degrees", degrees)
        return made

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a LeafEstimate is frozen: {name} cannot be set")

    def __getnewargs__(self) -> tuple[float, float, int]:  # type: ignore[override]
        return float(self), self.stderr, self.degrees

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
        """Return the two-sided Student interval of this contribution on its own.

        Args:
            level: Confidence level, in (0, 1).

        Returns:
            Lower and upper end.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        half = _half_width(self.stderr, self.degrees, level)
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
            name: LeafEstimate(part, self.leaf_stderr.get(name, math.nan), self.degrees)
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


@validated
def pool(estimates: Sequence[Estimate], weights: Sequence[float] | None = None, /) -> Estimate:
    """Return the weighted mean of independent estimates, such as one per batch.

        value = sum_b w_b value_b / sum_b w_b,  stderr^2 = sum_b w_b^2 stderr_b^2 / (sum_b w_b)^2

    with the degrees of freedom of Welch 1947.

    Args:
        estimates: Estimates of the same quantity for one tree of parameters, from different
            batches or different probes.
        weights: Weights of the estimates, such as the number of examples in each batch. By
            default, all weights are equal, all estimates must be of one matrix, and estimates that
            contradict each other are refused. Pass weights to pool estimates of different batches.

    Returns:
        `Estimate` without a seed of its own; ``seeds`` holds the seeds of the estimates.

    Raises:
        ValueError: If there is no estimate, if the number of weights differs from that of
            estimates, if the matrices differ in their leaves, if two estimates share a seed and
            therefore their probes, or if there are no weights and two estimates differ by more
            than their standard errors explain.
    """
    estimates = list(estimates)
    same_matrix = weights is None
    weights = [1.0] * len(estimates) if weights is None else [float(w) for w in weights]
    if not estimates or len(weights) != len(estimates):
        raise ValueError(
            f"there are {len(estimates)} estimates and {len(weights)} weights: pass at least one "
            "estimate, and one weight for each"
        )
    if not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0:
        raise ValueError(f"weights={weights}: choose finite numbers of at least 0, not all 0")
    _refuse_other_matrices(estimates)
    _refuse_shared_seeds(estimates)
    if same_matrix:
        _refuse_contradictions(estimates)
    share = [w / sum(weights) for w in weights]
    variances = [(s * e.stderr) ** 2 if s else 0.0 for s, e in zip(share, estimates, strict=True)]
    bounds = [e.bounds or (e.value, e.value) for e in estimates]
    ends = [sum(s * b[i] for s, b in zip(share, bounds, strict=True)) for i in (0, 1)]
    return Estimate(
        value=sum(s * e.value for s, e in zip(share, estimates, strict=True)),
        stderr=math.sqrt(sum(variances)),
        degrees=_pooled_degrees(variances, [e.degrees for e in estimates]),
        samples=torch.cat([e.samples for e in estimates]),
        by_leaf={
            name: sum(s * e.by_leaf[name] for s, e in zip(share, estimates, strict=True))
            for name in estimates[0].by_leaf
        },
        leaf_stderr={
            name: math.hypot(
                *(s * e.leaf_stderr[name] for s, e in zip(share, estimates, strict=True) if s)
            )
            for name in estimates[0].by_leaf
            if all(name in e.leaf_stderr for e in estimates)
        },
        leaf_shapes=estimates[0].leaf_shapes,
        n=estimates[0].n,
        bounds=(ends[0], ends[1]) if any(e.bounds for e in estimates) else None,
        matvecs=sum(e.matvecs for e in estimates),
        passes=sum(e.passes for e in estimates),
        reason=f"pooled from {len(estimates)} estimates",
        seed=None,
        seeds=[seed for e in estimates for seed in _seeds(e)],
    )


def _refuse_other_matrices(estimates: Sequence[Estimate]) -> None:
    """Raise if the leaves differ, unless only the number of examples of activations does."""
    first = estimates[0]
    for other in estimates[1:]:
        if first.n == other.n and _described(first) == _described(other):
            continue
        if _examples(first) is None or _per_example(first) != _per_example(other):
            raise ValueError(
                f"the estimates are of different matrices: n={first.n} with the leaves "
                f"{_described(first)}, and n={other.n} with {_described(other)}. Pool estimates "
                "for the same parameters"
            )


def _described(estimate: Estimate) -> dict[str, list[int] | None]:
    """Return the shapes of the leaves by name, None for an unknown shape."""
    shapes = estimate.leaf_shapes
    return {name: list(shapes[name]) if name in shapes else None for name in estimate.by_leaf}


def _examples(estimate: Estimate) -> int | None:
    """Return the common length of the first axis of all leaves, as of activations, or None."""
    lengths = {
        tuple(shape)[:1] if len(shape) > 1 else () for shape in estimate.leaf_shapes.values()
    }
    return next(iter(lengths))[0] if len(lengths) == 1 and () not in lengths else None


def _per_example(estimate: Estimate) -> dict[str, list[int]] | None:
    """Return the shapes of activations without the axis of examples, or None for other leaves."""
    if _examples(estimate) is None:
        return None
    return {name: list(shape)[1:] for name, shape in estimate.leaf_shapes.items()}


def _refuse_shared_seeds(estimates: Sequence[Estimate]) -> None:
    """Raise if two estimates share the seed of their probes or of their draws."""
    seeds = [seed for estimate in estimates for seed in _seeds(estimate)]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            "two estimates share a seed, so they are not independent: pass another `seed=` to each"
        )
    draws = [getattr(estimate, "draws_seed", None) for estimate in estimates]
    known = [seed for seed in draws if seed is not None]
    if len(set(known)) < len(known):
        raise ValueError(
            "two estimates share the seed of their draws, so they are from the same batches: pass "
            "another seed to each `draws(..., seed=)`"
        )


def _refuse_contradictions(estimates: Sequence[Estimate]) -> None:
    """Raise if two estimates of one number differ by more than chance explains.

    The distance of two values is compared with Student's quantile at the smaller degrees of
    freedom. Pools are not compared, since their estimates may be of different batches. Estimates
    with batches that were not drawn are not compared either, since their standard errors do not
    include those batches.
    """
    if len({estimate.n for estimate in estimates}) > 1:
        return
    places = [
        i
        for i, estimate in enumerate(estimates)
        if estimate.seed is not None and getattr(estimate, "every_batch_was_drawn", True)
    ]
    if len(places) < 2:
        return
    known = [estimates[i] for i in places]
    ends = [estimate.bounds or (estimate.value, estimate.value) for estimate in known]
    low, high = torch.tensor(ends, dtype=torch.float64, device="cpu").unbind(1)
    stderr = torch.tensor([e.stderr for e in known], dtype=torch.float64, device="cpu")
    pairs = len(known) * (len(known) - 1) / 2
    quantiles = torch.tensor(
        [student_quantile(1 - _CHANCE / (2 * pairs), e.degrees) for e in known],
        dtype=torch.float64,
        device="cpu",
    )
    gaps = torch.maximum(low[:, None] - high, low - high[:, None])
    explained = torch.maximum(quantiles[:, None], quantiles) * torch.hypot(stderr[:, None], stderr)
    # Equal values without errors give 0 / 0, and agree.
    distances = (gaps / explained).nan_to_num(nan=0.0)
    if not float(distances.max()) > 1:
        return
    first, second = sorted(divmod(int(distances.argmax()), len(known)))
    one, other = known[first], known[second]
    raise ValueError(
        f"estimates[{places[first]}] and estimates[{places[second]}] contradict each other: "
        f"{one.value:.6g} with the standard error {one.stderr:.2g}, and {other.value:.6g} with "
        f"{other.stderr:.2g}. Pool estimates of one matrix, or, for different batches, pass their "
        "numbers of examples as weights, such as pool(estimates, [64, 64])"
    )


def _seeds(estimate: Estimate) -> list[int]:
    """Return the seed of an estimate, or the seeds of a pool."""
    return list(estimate.seeds) if estimate.seed is None else [estimate.seed]


def _pooled_degrees(variances: Sequence[float], degrees: Sequence[int]) -> int:
    """Return the degrees of freedom of a sum of estimated variances (Welch 1947).

    degrees = (sum_b v_b)^2 / sum_b (v_b^2 / degrees_b)
    """
    if math.isinf(sum(variances)):
        return min(degrees)
    spread = sum(v**2 / max(d, 1) for v, d in zip(variances, degrees, strict=True))
    return math.floor(sum(variances) ** 2 / spread) if spread > 0 else sum(degrees)
