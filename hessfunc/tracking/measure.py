"""Curvature at one point of a training, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.eigen.follow import Followed, follow
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.autograd import differentiable_twice
from hessfunc.losses import LossFunction
from hessfunc.options import at_least
from hessfunc.recipes.sharpness import critical_sharpness
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.hessian import hvp
from hessfunc.transforms.matvecs.arithmetic import precondition
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The curvature at one point, in the units of the loss over those of the parameters squared.

    Attributes:
        loss: the mean over the batches; None where it is not finite, and then nothing is measured.
        top: the largest eigenvalues, descending.
        top_residuals: |A v - value v| of each: some eigenvalue lies so close. Nothing is promised
            about its index: one that overtakes all is found some points later.
        bottom: the smallest eigenvalues, ascending.
        bottom_residuals: of each.
        trace: its estimate; None where it is not asked for.
        trace_stderr: the standard error of the trace.
        preconditioned: the largest eigenvalue of P^-1/2 A P^-1/2; None without a preconditioner.
        preconditioned_residual: of it.
        critical: critical sharpness along the gradient; None where it is not asked for, or no
            finite number.
        matvecs: products that were spent.
        evaluations: forward passes over the batches that were spent on critical sharpness.
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
    critical: float | None = None
    matvecs: int = 0
    evaluations: int = 0


@dataclass(frozen=True, kw_only=True)
class TrackingState:
    """Where the next point starts.

    Attributes:
        top: the last largest eigenpairs with their vectors, the guards after those asked for.
        bottom: the last smallest.
        preconditioned: the last of the preconditioned matrix.
        critical_step: the last step that raised the loss.
    """

    top: Followed | None = None
    bottom: Followed | None = None
    preconditioned: Followed | None = None
    critical_step: float = 1.0


Measure: TypeAlias = Callable[..., tuple[TrackingState, Measurement]]


@dataclass(frozen=True)
class Tracking:
    """Two functions, both pure.

    Attributes:
        init: ``params -> state``.
        measure: ``(state, params, batches, preconditioner=None) -> (state, measurement)``.
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
    keep: bool = False,
    seed: int = 0,
) -> Tracking:
    """The curvature of a loss from point to point of a training, each started from the last one.

    Args:
        loss: ``(params, batch) -> scalar``.
        curvature: loss -> curvature function, such as `hvp` or `ggnvp`.
        top: how many of the largest eigenvalues.
        bottom: how many of the smallest; next to the bulk they take many more products.
        trace_probes: random vectors of the trace, 0 for none. They are the same at each point, so
            that the curve is smooth; the largest eigenpairs are taken out first.
        critical: whether critical sharpness along the gradient is measured.
        guards: eigenvectors that are carried along beside those asked for, to see at once one
            that overtakes them.
        rtol: of the residuals. A value is off by about its square, over the relative gap.
        max_matvecs: the budget of each end at a point. Residuals tell what it was enough for.
        weight: what a batch counts, as in `over_batches`.
        keep: keep the graphs of several batches during a measurement; that of one is kept.
        seed: of the first vectors, and of the probes.

    Returns:
        `Tracking`. Its ``measure`` takes any re-iterable of batches and, for preconditioned
        sharpness, a positive diagonal such as `adam_diagonal`.

    Raises:
        ValueError: an option is out of range.
        FloatingPointError: (from ``measure``) a product is not finite.

    Cost: the loss and its gradient with a graph, and the products. Of a perceptron in full-batch
    gradient descent, every 10 steps, the largest eigenvalue takes 4 products a point and 11
    unless started from the last.

    Source: Cohen et al. 2021, arXiv 2103.00065; preconditioned: Cohen et al. 2022,
    arXiv 2207.14484; critical: Kalra et al. 2026, arXiv 2601.16979.
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
            raise ValueError(f"top={top}, bottom={bottom}: the matrix has {n} eigenvalues")
        return TrackingState()

    def measure(
        state: TrackingState,
        params: Tree,
        batches: Iterable[Any],
        preconditioner: Mapping[str, Tensor] | None = None,
    ) -> tuple[TrackingState, Measurement]:
        single = isinstance(batches, Sized) and len(batches) == 1
        average = Average(weight, several=not single)
        mean = _mean(loss, average)
        value = _value(mean, params, batches)
        if not math.isfinite(value):
            return state, Measurement(loss=None)
        matvec = over_batches(of_batch, weight=weight, keep=keep or single)(params, batches)
        largest = smallest = felt = trace = found = None
        if top:
            largest = pairs(matvec, params, k=top, end="largest", before=state.top)
        if bottom:
            smallest = pairs(matvec, params, k=bottom, end="smallest", before=state.bottom)
        if preconditioner is not None:
            divided = precondition(matvec, preconditioner)
            felt = pairs(divided, params, k=1, end="largest", before=state.preconditioned)
        if trace_probes:
            trace = hutchinson(matvec, params, deflate=largest, max_matvecs=trace_probes, seed=seed)
        if critical:
            direction = _gradient(loss, average, params, batches)
            found = critical_sharpness(mean, params, batches, direction, start=state.critical_step)
        step = state.critical_step if found is None else found.step
        next_state = TrackingState(
            top=largest,
            bottom=smallest,
            preconditioned=felt or state.preconditioned,
            critical_step=step if 0 < step < math.inf else 1.0,
        )
        spent = (largest, smallest, felt, trace)
        tops, bottoms = _first(largest, top), _first(smallest, bottom)
        return next_state, Measurement(
            loss=value,
            top=tops[0],
            top_residuals=tops[1],
            bottom=bottoms[0],
            bottom_residuals=bottoms[1],
            trace=None if trace is None else trace.value,
            trace_stderr=None if trace is None else trace.stderr,
            preconditioned=None if felt is None else float(felt.values[0]),
            preconditioned_residual=None if felt is None else float(felt.residuals[0]),
            critical=found.value if found is not None and math.isfinite(found.value) else None,
            matvecs=sum(result.matvecs for result in spent if result is not None),
            evaluations=0 if found is None else found.evaluations,
        )

    return Tracking(init, measure)


def _first(pairs: Eigenpairs | None, k: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The first values and residuals; those of the guards are left out."""
    if pairs is None:
        return (), ()
    return tuple(pairs.values[:k].tolist()), tuple(pairs.residuals[:k].tolist())


def _mean(loss: LossFunction, average: Average) -> LossFunction:
    """The loss of several batches."""

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


def _gradient(loss: LossFunction, average: Average, params: Tree, batches: Iterable[Any]) -> Tree:
    """That of the mean, batch by batch: one graph is in memory at a time."""
    space = space_of(params)
    point = [leaf.detach().requires_grad_() for leaf in space.tree_leaves(params)]
    total, weights = [torch.zeros_like(leaf) for leaf in point], 0.0
    for batch in batches:
        average.look(loss, params, batch)
        counted = average.of(batch)
        if not counted:
            continue
        with differentiable_twice(space.device):
            value = loss(space.tree(point), batch)
            found = torch.autograd.grad(value, point, materialize_grads=True)
        for target, part in zip(total, found, strict=True):
            target.add_(part, alpha=counted)
        weights += counted
    return space.tree(target / average.divisor(weights) for target in total)


@dataclass(frozen=True, kw_only=True)
class Point(Measurement):
    """A measurement, and when it was made.

    Attributes:
        step: steps of the optimiser before it.
        epoch: passes over the data before it; None where nobody told.
        lr: the learning rate of the step to come; None where nobody told.
        edge: Largest eigenvalue at which the optimiser's next step is stable on a quadratic; None
            where it is not known, as for Adam.
        preconditioned_edge: The same of the preconditioned sharpness; None for all but Adam.
        seconds: that it took.
    """

    step: int
    epoch: float | None = None
    lr: float | None = None
    edge: float | None = None
    preconditioned_edge: float | None = None
    seconds: float = 0.0
