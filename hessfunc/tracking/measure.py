"""Measure the curvature at one point of a training, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.eigen.follow import Followed, follow
from hessfunc.algorithms.frank_wolfe import generalized_sharpness
from hessfunc.algorithms.results import Eigenpairs, GeneralizedSharpness
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.autograd import differentiable_twice
from hessfunc.containers import number_of
from hessfunc.display import Achieved, Displayed
from hessfunc.losses import LossFunction
from hessfunc.optim.stability.result import Stability
from hessfunc.options import at_least
from hessfunc.recipes.sharpness import critical_sharpness
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.gradient import mean_gradient
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.batches.sums import Keep
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import Tree

# Runs of the generalized sharpness from random directions, besides that from the last direction.
_RESTARTS = 2
# Stability limit of the next step, or a function of the gradient that returns it, or None.
Limit: TypeAlias = Stability | Callable[[Tree], Stability | None]

# Number of eigenvalues of each end that a summary shows.
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, repr=False)
class Measurement(Displayed):
    """Curvature at one point, in units of the loss divided by those of the parameters squared.

    Attributes:
        loss: Mean loss over the batches. None if it is not finite; then nothing else is measured.
        top: Largest eigenvalues, in descending order.
        top_residuals: Residual |A v - value v| of each pair: some eigenvalue lies within this
            distance of the value. Its index is not certain, because an eigenvalue that overtakes
            the others may be detected some points later.
        bottom: Smallest eigenvalues, in ascending order.
        bottom_residuals: Residuals of the smallest eigenvalues.
        trace: Estimate of the trace; None if it was not requested.
        trace_stderr: Standard error of the trace.
        preconditioned: Sharpness that limits the steps of the optimiser: the largest eigenvalue of
            P^-1/2 (A + W) P^-1/2, or the generalized sharpness in its norm, a lower bound; None
            without a `Stability`.
        preconditioned_residual: Residual of this eigenvalue, or the gap of the generalized
            sharpness.
        preconditioned_edge: Threshold that ``preconditioned`` must not pass.
        critical: Critical sharpness along the gradient; None if it was not requested or is not
            finite.
        matvecs: Number of products used.
        evaluations: Number of forward passes over the batches used by the critical sharpness.
    """

    loss: float | None
    top: tuple[float, ...] = ()
    top_residuals: tuple[float, ...] = ()
    bottom: tuple[float, ...] = ()
    bottom_residuals: tuple[float, ...] = ()
    trace: float | None = None
    trace_stderr: float | None = None
    preconditioned: float | None = None
    preconditioned_residual: float | None = None
    preconditioned_edge: float | None = None
    critical: float | None = None
    matvecs: int = 0
    evaluations: int = 0

    def achieved(self) -> Achieved:
        """Return the largest eigenvalue with its residual."""
        if not self.top:
            return Achieved()
        return Achieved(value=self.top[0], half_width=self.top_residuals[0])

    def _headline(self) -> dict[str, object]:
        rows: dict[str, object] = {
            "loss": "not finite" if self.loss is None else f"{self.loss:.6g}"
        }
        for name in ("top", "bottom"):
            values, residuals = getattr(self, name), getattr(self, f"{name}_residuals")
            if values:
                pairs = zip(values[:_SHOWN], residuals, strict=False)
                known = ", ".join(_between(*pair) for pair in pairs)
                rows[name] = f"[{known}{', ...' if len(values) > _SHOWN else ''}]"
        if self.trace is not None:
            rows["trace"] = _between(self.trace, self.trace_stderr)
        if self.preconditioned is not None:
            rows["preconditioned"] = _between(self.preconditioned, self.preconditioned_residual)
        if self.preconditioned_edge is not None:
            rows["preconditioned_edge"] = f"{self.preconditioned_edge:.6g}"
        if self.critical is not None:
            rows["critical"] = f"{self.critical:.6g}"
        return {**rows, "matvecs": self.matvecs}


@dataclass(frozen=True, kw_only=True)
class TrackingState:
    """Results of the last point, from which the next point starts.

    Attributes:
        top: Largest eigenpairs with their vectors; the guards follow the requested pairs.
        bottom: Smallest eigenpairs with their vectors.
        preconditioned: Largest eigenpair of the preconditioned matrix.
        direction: Direction of the generalized sharpness.
        critical_step: Last step that raised the loss.
    """

    top: Followed | None = None
    bottom: Followed | None = None
    preconditioned: Followed | None = None
    direction: Tree | None = None
    critical_step: float = 1.0


Measure: TypeAlias = Callable[..., tuple[TrackingState, Measurement]]


@dataclass(frozen=True)
class Tracking:
    """Tracker as a pair of pure functions.

    Attributes:
        init: Function ``params -> state``.
        measure: Function ``(state, params, batches, stability=None) -> (state, measurement)``.
    """

    init: Callable[[Tree], TrackingState]
    measure: Measure


@options.validated(curvature=options.factory)
def functional_tracker(
    loss: LossFunction,
    /,
    *,
    curvature: Callable[[Any], Curvature] = hvp,
    top: int = 1,
    bottom: int = 0,
    trace_probes: int = 0,
    critical: bool = False,
    guards: int = 1,
    rtol: float = 0.01,
    max_matvecs: int = 100,
    weight: Callable[[Any], float] | None = None,
    keep: Keep = False,
    seed: int = 0,
) -> Tracking:
    """Track the curvature of a loss during a training, starting each point from the last one.

    Args:
        loss: Function ``(params, batch) -> scalar``.
        curvature: Function from a loss to its curvature function, such as `hvp` or `ggnvp`.
        top: Number of largest eigenvalues.
        bottom: Number of smallest eigenvalues. They need many more products if they are close to
            the bulk of the spectrum.
        trace_probes: Number of random probes for the trace, 0 for none. All points use the same
            probes, so that the curve is smooth. The largest eigenpairs are projected out first.
        critical: Whether the critical sharpness along the gradient is measured.
        guards: Number of additional eigenvectors that are tracked, so that an eigenvalue that
            overtakes the requested ones is detected at once.
        rtol: Relative tolerance of the residuals. The relative error of an eigenvalue is about
            ``rtol^2`` divided by the relative gap.
        max_matvecs: Largest number of products at a point for each end of the spectrum. The
            residuals show the accuracy that was reached.
        weight: Weight of a batch in the mean, as in `over_batches`.
        keep: Whether the graphs of several batches are kept during a measurement. The graph of a
            single batch is always kept.
        seed: Seed of the start vectors and of the probes.

    Returns:
        A `Tracking`. Its ``measure`` takes any re-iterable of batches and, for the sharpness that
        limits an optimiser, a `Stability`, or a function from the gradient to one.

    Raises:
        ValueError: If an option is out of range.
        FloatingPointError: If a product is not finite. Raised by ``measure``.

    Cost: the loss, its gradient with a graph, and the products; one more gradient for the critical
    sharpness or a function of the gradient. For a perceptron in full-batch
    gradient descent, measured every 10 steps, the largest eigenvalue takes 4 products a point,
    and 11 without the start from the last point.

    Source: Cohen et al. 2021, arXiv 2103.00065; preconditioned: Cohen et al. 2022,
    arXiv 2207.14484; in a norm: Islamov et al. 2026, arXiv 2603.05002; critical: Kalra et al. 2026,
    arXiv 2601.16979.
    """
    at_least(0, top=top, bottom=bottom, guards=guards, rtol=rtol)
    at_least(2 + guards + max(1, top, bottom), max_matvecs=max_matvecs)
    if trace_probes:
        at_least(2, trace_probes=trace_probes)
    of_batch = curvature(loss)

    pairs = partial(follow, guards=guards, rtol=rtol, max_matvecs=max_matvecs, seed=seed)

    def init(params: Tree) -> TrackingState:
        n = space_of(params).n
        if max(top, bottom) > n:
            raise ValueError(
                f"top={top}, bottom={bottom}: the matrix has only {n} eigenvalues; pass smaller "
                "numbers"
            )
        return TrackingState()

    def measure(
        state: TrackingState,
        params: Tree,
        batches: Iterable[Any],
        stability: Limit | None = None,
    ) -> tuple[TrackingState, Measurement]:
        single = number_of(batches) == 1
        average = Average(weight, several=not single)
        mean = _mean(loss, average)
        value = _value(mean, params, batches)
        if not math.isfinite(value):
            return state, Measurement(loss=None)
        matvec = over_batches(of_batch, weight=weight, keep=keep or single)(params, batches)
        largest = smallest = trace = sharpness = None
        felt: Followed | GeneralizedSharpness | None = None
        gradient: Tree | None = None
        if critical or callable(stability):
            gradient = mean_gradient(loss, average, params, batches)[1]
        limit = stability(gradient) if callable(stability) else stability
        if top:
            largest = pairs(matvec, params, k=top, which="LA", before=state.top)
        if bottom:
            smallest = pairs(matvec, params, k=bottom, which="SA", before=state.bottom)
        if limit is not None:
            seen = limit.preconditioned(matvec)
            if limit.norm is None:
                felt = pairs(seen, params, k=1, which="LA", before=state.preconditioned)
            else:
                felt = generalized_sharpness(
                    seen,
                    params,
                    limit.norm,
                    restarts=_RESTARTS,
                    rtol=rtol,
                    max_matvecs=max_matvecs,
                    start=state.direction,
                    seed=seed,
                )
        if trace_probes:
            # One more product checks the eigenpairs.
            budget = trace_probes + (largest is not None)
            trace = hutchinson(matvec, params, deflate=largest, max_matvecs=budget, seed=seed)
        if critical:
            sharpness = critical_sharpness(
                mean, params, batches, gradient, start=state.critical_step
            )
        step = state.critical_step if sharpness is None else sharpness.step
        next_state = TrackingState(
            top=largest,
            bottom=smallest,
            preconditioned=felt if isinstance(felt, Followed) else state.preconditioned,
            direction=(
                felt.direction if isinstance(felt, GeneralizedSharpness) else state.direction
            ),
            critical_step=step if 0 < step < math.inf else 1.0,
        )
        spent = (largest, smallest, felt, trace)
        tops, bottoms = _first(largest, top), _first(smallest, bottom)
        value_felt, residual = _felt(felt)
        return next_state, Measurement(
            loss=value,
            top=tops[0],
            top_residuals=tops[1],
            bottom=bottoms[0],
            bottom_residuals=bottoms[1],
            trace=None if trace is None else trace.value,
            trace_stderr=None if trace is None else trace.stderr,
            preconditioned=value_felt,
            preconditioned_residual=residual,
            preconditioned_edge=None if limit is None else limit.threshold,
            critical=(
                sharpness.value
                if sharpness is not None and math.isfinite(sharpness.value)
                else None
            ),
            matvecs=sum(result.matvecs for result in spent if result is not None),
            evaluations=0 if sharpness is None else sharpness.evaluations,
        )

    return Tracking(init, measure)


def _first(pairs: Eigenpairs | None, k: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the first k values and residuals, without those of the guards."""
    if pairs is None:
        return (), ()
    return tuple(pairs.values[:k].tolist()), tuple(pairs.residuals[:k].tolist())


def _felt(found: Followed | GeneralizedSharpness | None) -> tuple[float | None, float | None]:
    """Return the sharpness that limits the optimiser, and its residual or gap."""
    match found:
        case None:
            return None, None
        case GeneralizedSharpness():
            return found.value, found.gap
        case _:
            return float(found.values[0]), float(found.residuals[0])


def _mean(loss: LossFunction, average: Average) -> LossFunction:
    """Return the mean loss of several batches as a loss ``(params, batches) -> scalar``."""

    def of_all(params: Tree, batches: Iterable[Any]) -> Tensor:
        pairs = []
        for batch in batches:
            average.look(loss, params, batch)
            # The loss of a batch of weight 0 may be 0 / 0.
            if counted := average.of(batch):
                pairs.append((loss(params, batch), counted))
        values = torch.stack([value for value, _ in pairs])
        weights = values.new_tensor([counted for _, counted in pairs])
        return values @ weights / average.divisor(float(weights.sum()))

    return of_all


def _value(mean: LossFunction, params: Tree, batches: Iterable[Any]) -> float:
    with differentiable_twice(space_of(params).device), torch.no_grad():
        return float(mean(params, batches))


@dataclass(frozen=True, kw_only=True, repr=False)
class Point(Measurement):
    """Measurement with its position in the training.

    Attributes:
        step: Number of steps of the optimiser before the measurement.
        epoch: Number of passes over the data before the measurement; None if it is unknown.
        lr: Learning rate of the next step; None if it is unknown.
        edge: Largest eigenvalue at which the optimiser's next step is stable on a quadratic; None
            if the step has a preconditioner or a norm, as for Adam and Muon, or if it is unknown.
        optimizer: Name of the optimiser; None if `stability` does not know it.
        seconds: Duration of the measurement, in seconds.
    """

    step: int
    epoch: float | None = None
    lr: float | None = None
    edge: float | None = None
    optimizer: str | None = None
    seconds: float = 0.0

    def _headline(self) -> dict[str, object]:
        place = {"step": self.step, "lr": self.lr, "edge": self.edge}
        shown = {n: f"{x:.6g}" for n, x in place.items() if x is not None}
        return {**shown, **super()._headline()}


def _between(value: float, radius: float | None) -> str:
    """Return a value with the half-width of its interval as text."""
    return f"{value:.6g} ± {radius or 0.0:.2g}"
