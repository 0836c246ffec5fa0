"""Trace from random batches, with the noise of the data separated from that of the probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RUNNING, Method, RunOptions, run_method
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results.estimate import leaf_fields, narrow_enough
from hessfunc.algorithms.results.result import judged
from hessfunc.algorithms.results.sampled import SampledEstimate
from hessfunc.algorithms.statistics import (
    FEWEST_SAMPLES,
    STOPPED,
    leaf_errors,
    rounding_of_sum,
    standard_error,
)
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import ProbeKind, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of draws between two tests of the interval. A run that tests it more often is more likely
# to stop where the interval is narrow by chance.
_DRAWS_A_ROUND = 10
# Number of random signs below which all samples may agree by chance.
_FEWEST_SIGNS = 8


@validated
def sampled_trace(
    draws: Callable[[int], Matvec],
    like: Tree,
    *,
    probes: int = 1,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    kind: ProbeKind = "signs",
    block_size: int = 10,
    **run: Unpack[RunOptions],
) -> SampledEstimate:
    """Estimate the trace of a data set's matrix from random batches, with a few probes on each.

    With A = E[A_i] over random draws i, and r fresh probes w on each draw,

        tr A = E[w'A_i w],    var(mean of m draws) = f data / m + probes / (m r),

    where ``data`` is the variance of tr A_i over draws, ``probes`` is the variance of w'A_i w
    within one draw, and f is the finite population correction. Without replacement, f is 1 - m / B
    in the first pass over B batches, and 0 after whole passes; with replacement, f is 1. A one-way
    analysis of variance separates the two sources of noise. With the mean squares within draws,
    MSW, and between draws, MSB,

        probes = MSW,    data = max(0, (MSB - MSW) / r).

    The interval is Student's, widened for skewness. It covers both sources of noise if the batches
    are similar. No interval covers batches of large curvature that are so rare that none was drawn
    (Bahadur and Savage 1956). Therefore a run converges only after a full pass. If the tolerance is
    reached earlier, the run finishes the pass if that at most doubles the work. Otherwise it stops
    with the reason "tolerance reached, not certified". If all drawn batches agree to rounding,
    their noise is unknown, and the interval is infinite until every batch is drawn.

    For an equal standard error, random batches took 30 to 80 times fewer gradients than full passes
    on untrained perceptrons with 100 to 200 batches. On a trained ResNet-20 with 80 batches, where
    a few examples dominate the trace, they took 1.6 times fewer (``python -m bench.draws``).
    There, ``draws(..., proxy=)`` meets the heavy batches more often. The run still does not
    converge, since no proxy excludes a heavy batch that it calls light. On a trained Llama with 77
    windows of text, which are alike, random batches took about 4 times more gradients than full
    passes, and proxies did not help. Take `hutchinson` of the whole data set if ``advice`` names
    the probes as the larger source of noise.

    Args:
        draws: Function from i to the matvec of the i-th random batch, made by `hessfunc.draws`,
            whose functions also know the number of batches.
        like: Tree that shows the structure of a vector.
        probes: Number r of probes on each draw. At least 2 are needed to separate the two sources
            of noise.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        max_matvecs: Budget, the largest number of products, r per draw.
        kind: Distribution of the probes: ``"signs"``, ``"normal"`` or ``"sphere"``.
        block_size: Number of probes of one draw that are multiplied at once.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `SampledEstimate`, whose ``advice`` says whether more draws or more probes per draw narrow
        the interval for less work. Its ``matvecs`` counts products of one vector with one batch,
        not with the data set.

    Raises:
        ValueError: If an option is out of range.
        FloatingPointError: If a product is not finite.

    Cost: r products with one batch per draw, and the graph of that batch. Memory: 3 block_size + 2
    vectors.

    Source: Girard 1989; Hutchinson 1990; the analysis of variance: Searle, Casella and McCulloch
    1992, Variance components, section 3.5.
    """
    at_least(2 * probes, max_matvecs=max_matvecs)
    products = Products.of(lambda block: draws(0)(block), like, run.get("space"))
    method = SampledTrace(
        draws=draws,
        block_size=block_size,
        rtol=rtol,
        atol=atol,
        probes=probes,
        kind=kind,
        max_matvecs=max_matvecs,
    )
    return run_method(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class SampledTrace(Method["_State", SampledEstimate]):
    """Mean of the quadratic forms of random batches.

    Attributes:
        draws: Function from the index of a draw to the matvec of its batch.
        probes: Number r of probes on each draw.
        kind: Distribution of the probes.
        block_size: Number of probes of one draw that are multiplied at once.
        rtol: Relative tolerance at which the run stops.
        atol: Absolute tolerance at which the run stops.
        max_matvecs: Budget, which decides whether the run may finish a pass over all batches.
    """

    draws: Callable[[int], Matvec]
    probes: int
    kind: ProbeKind
    block_size: int
    rtol: float | None
    atol: float | None
    max_matvecs: int

    def __post_init__(self) -> None:
        at_least(0, rtol=self.rtol, atol=self.atol)
        at_least(1, probes=self.probes, block_size=self.block_size)

    def options(self) -> dict[str, Any]:
        return {
            "probes": self.probes,
            "kind": self.kind,
            "block_size": self.block_size,
            "draws": getattr(self.draws, "seed", None),
        }

    @property
    def population(self) -> int | None:
        """Number of batches if they are drawn without replacement, else None."""
        return getattr(self.draws, "population", None)

    @property
    def has_tolerance(self) -> bool:
        """Whether the run stops before its budget is exhausted."""
        return self.rtol is not None or self.atol is not None

    def init(self, products: Products, seed: int, /) -> _State:
        shape = (0, self.probes, len(products.space.names))
        return _State(torch.zeros(shape, dtype=torch.float64, device="cpu"), seed)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        m, population = len(state.parts), self.population
        count = min(room // self.probes, _DRAWS_A_ROUND)
        if population is not None:
            # Stop at the end of a pass, where only the probes contribute to the error.
            count = min(count, population - m % population)
        samples = [self._of_draw(i, products, state.seed) for i in range(m, m + count)]
        if not samples:
            return state
        return _State(torch.cat([state.parts, torch.stack(samples)]), state.seed)

    def _of_draw(self, i: int, products: Products, seed: int) -> Tensor:
        """Return ``w'A_i w`` of each probe of a draw by leaf, float64 ``(r, leaves)``."""
        # The matvec, which holds the batch's graph, must be freed before the next draw is made.
        space, r = products.space, self.probes
        of_batch = Products(self.draws(i), space, keep_first=i == 0)
        parts = []
        for first in range(i * r, (i + 1) * r, self.block_size):
            indices = range(first, min(first + self.block_size, (i + 1) * r))
            rows = space.probes(indices, kind=self.kind, seed=seed, dtype=rows_dtype(space))
            parts.append(space.by_leaf(rows, of_batch.as_given(rows)).cpu().double())
        products.matvecs += of_batch.matvecs
        products.passes += of_batch.passes
        products.first = products.first or of_batch.first
        return torch.cat(parts)

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> SampledEstimate:
        """Return the estimate, whether or not it is within the tolerance."""
        samples, m, population = state.parts.sum(2), len(state.parts), self.population
        means = samples.mean(1)
        places = range(m) if population is None else [self.draws.batch(i) for i in range(m)]  # type: ignore[attr-defined]
        noise = _noise(samples, places, population)
        eps = products_eps(space)
        rounding = rounding_of_sum(eps) * float(samples.abs().mean())
        stderr = (noise.stderr + rounding) * (STOPPED if self.has_tolerance else 1.0)
        every_batch = population is not None and m >= population
        if noise.stderr <= rounding and not (every_batch and _show_noise(samples, self.kind)):
            stderr = math.inf
        return SampledEstimate(
            value=float(means.mean()),
            stderr=stderr,
            degrees=noise.degrees,
            samples=means,
            **leaf_fields(
                space, state.parts.mean((0, 1)), leaf_errors(state.parts.mean(1), stderr)
            ),
            variance_probes=noise.within,
            variance_data=noise.between,
            draws=m,
            probes_per_draw=self.probes,
            population=population,
            correction=noise.correction,
            draws_seed=getattr(self.draws, "seed", None),
            **cost,
        )

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        m = len(state.parts)
        if not self.has_tolerance or m < FEWEST_SAMPLES:
            return None
        estimate = self.estimate(state, products.space, products.cost(RUNNING, None))
        reason = narrow_enough(estimate, self.rtol, self.atol)
        if _is_certified(estimate) or (reason is None and math.isfinite(estimate.stderr)):
            return reason
        # With one probe per draw, the noise of the probes is known only after two passes.
        wanted = (self.population or 0) * (1 if self.probes > 1 else 2)
        fits = wanted <= 2 * m and wanted * self.probes <= self.max_matvecs
        if self.population is not None and fits:
            return None
        return _uncertified(estimate)

    def result(self, state: _State, space: Space, cost: Cost, /) -> SampledEstimate:
        estimate = self.estimate(state, space, cost)
        if estimate.reason == RUNNING:
            return estimate
        if math.isinf(estimate.stderr) and "not certified" not in estimate.reason:
            return replace(estimate, reason=f"{estimate.reason}; {_uncertified(estimate)}")
        if _is_certified(estimate):
            return judged(estimate, narrow_enough(estimate, self.rtol, self.atol))
        if narrow_enough(estimate, self.rtol, self.atol):
            return replace(estimate, reason=_uncertified(estimate))
        return estimate


@dataclass(frozen=True)
class _State:
    """State of a run, with m draws.

    Attributes:
        parts: Samples ``w'A_i w`` by draw, probe and leaf, float64 ``(m, r, leaves)``.
        seed: Seed of the probes.
    """

    parts: Tensor
    seed: int


def _is_certified(estimate: SampledEstimate) -> bool:
    """Return whether every batch was drawn and the noise of the probes is known."""
    return estimate.every_batch_was_drawn and not math.isnan(estimate.variance_probes)


def _uncertified(estimate: SampledEstimate) -> str:
    """Return the reason of a run that stops without a certified interval."""
    reason = "tolerance reached, not certified: "
    if math.isinf(estimate.stderr):
        reason = "not certified, and the interval is not known: the samples agree to rounding, but "
        if estimate.every_batch_was_drawn:
            return f"{reason}so few random signs can agree by chance, take probes={_FEWEST_SIGNS}"
    if estimate.population is None:
        return reason + "batches that were not drawn can differ"
    if not estimate.every_batch_was_drawn:
        unseen = estimate.population - estimate.draws
        return f"{reason}{unseen} of {estimate.population} batches were not drawn, and can differ"
    return reason + "the noise of a single probe on each batch is not known, take probes=2"


@dataclass(frozen=True)
class _Noise:
    """Standard error of a mean over draws, with the variances of its two sources.

    Attributes:
        stderr: Standard error of the mean.
        degrees: Degrees of freedom with which the standard error is known.
        within: Variance of one probe within a batch, NaN if unknown.
        between: Variance between batches, NaN if unknown.
        correction: Finite population correction f of the variance between batches.
    """

    stderr: float
    degrees: int
    within: float
    between: float
    correction: float


def _noise(samples: Tensor, places: Sequence[int], population: int | None) -> _Noise:
    """Return the noise of the mean of samples ``(m, r)``.

    Consider m = q B + s draws without replacement from a population of B batches. After q whole
    passes the contribution of the batches has no error, and the fraction f = s (1 - s / B) / m of
    the variance between batches remains (Cochran 1977, sections 2.6 and 10.3):

        var = f var(means) / m + (1 - f) sum_b n_b v_b / (m^2 r),

    where batch b was drawn n_b times and v_b is the variance of its probes. The degrees of freedom
    are those of Welch 1947, less two for estimated weights. The contribution of the probes is
    widened for skewness, since a few batches may dominate it.

    Args:
        samples: Samples, one row per draw, float64 ``(m, r)``.
        places: Index of the batch of each draw.
        population: Number B of batches, or None with replacement.
    """
    m, r = samples.shape
    means = samples.mean(1)
    error = standard_error(means)
    groups = _by_batch(samples, places)
    if min(len(group) for group in groups) < 2:
        # A batch with a single sample does not show the variance v_b of its probes.
        return _Noise(error, m - 1, math.nan, math.nan, 1.0)
    within = float(samples.var(1).mean()) if r > 1 else float(_weighted(groups).sum()) / m
    between = max(0.0, float(means.var()) - within / r) if m > 1 else math.nan
    if population is None:
        return _Noise(error, m - 1, within, between, 1.0)
    rest = m % population
    f = rest * (1 - rest / population) / m
    terms = _weighted(groups) / (m * r) ** 2
    freedom = torch.tensor(
        [len(group) + 1.0 for group in groups], dtype=torch.float64, device="cpu"
    )
    probes = (1 - f) * float(terms.sum())
    known = float(terms.sum()) ** 2 / float((terms.square() / freedom).sum()) if probes else 3.0
    of_probes = max(known - 2, 1.0)
    probes *= (1 + 1 / math.sqrt(of_probes)) ** 2
    data = f * error**2 if f else 0.0
    spread = data**2 / max(m - 1, 1) + probes**2 / of_probes
    degrees = max(1, math.floor((data + probes) ** 2 / spread)) if spread > 0 else m
    return _Noise(math.sqrt(data + probes), degrees, within, between, f)


def _show_noise(samples: Tensor, kind: ProbeKind) -> bool:
    """Return whether there are enough probes for their samples to show their noise."""
    return kind != "signs" or samples.numel() >= _FEWEST_SIGNS


def _by_batch(samples: Tensor, places: Sequence[int]) -> list[Tensor]:
    """Return the samples of each batch that was drawn."""
    rows: dict[int, list[int]] = {}
    for row, place in enumerate(places):
        rows.setdefault(place, []).append(row)
    return [samples[draws].flatten() for draws in rows.values()]


def _weighted(groups: Sequence[Tensor]) -> Tensor:
    """Return n_b r v_b for each batch b: the variance of its probes times their number."""
    return torch.stack([len(group) * group.var() for group in groups])
