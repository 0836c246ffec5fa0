"""The cell of the trace to two per cent, over several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import hessfunc as hf
from bench.interleaved import Turns, ratio
from bench.speed import models, ours
from bench.speed.asked import BY_TORCH, Asked, Kind
from bench.speed.cells import Cell, Row
from bench.speed.peers import curvlinops, eigenthings, pyhessian
from bench.speed.turns import Effort, gradient_of, reason_of
from hessfunc.randomness import seeded

ACCURACY = 0.02
IMAGES = 500
_MICROBATCH = 25
_REFERENCE_SEED = 10_001
# The half-width of a 95 % interval, in standard errors.
_INTERVAL = 1.96
_GRADIENT = "a gradient"


class Traced(NamedTuple):
    """An estimate, the products that it took, and the samples z'Az of a Hutchinson estimate."""

    value: float
    products: int
    samples: Sequence[float] = ()


@dataclass(frozen=True)
class _Method:
    """An estimator.

    Attributes:
        title: the library, and which of its ways.
        package: of PyPI.
        kind: whose.
        estimate: by a seed.
        rule: when it stops.
        independent: it is a mean of independent samples, so that so many more reach the accuracy.
    """

    title: str
    package: str
    kind: Kind
    estimate: Callable[[Asked, int], Traced]
    rule: str
    independent: bool = False


def trace(name: str, effort: Effort, examples: int = IMAGES) -> Cell:
    """The trace of the Hessian of so many images, within two per cent.

    Ours stops when its own standard error is two per cent, the others by their own rule. Where
    that misses the accuracy in the median over seeds, the means of independent samples are given
    as many samples as a standard error of two per cent takes, at the time of each of theirs.
    """
    asked = Asked(models.made(name, examples))
    reference = _reference(asked)
    methods = _methods()
    turns, found, gaps = _run(asked, methods, effort)
    seconds = {m.title: turns.seconds[m.title] for m in methods if m.title not in gaps}
    spread = _relative_spread(found, float(reference.value))
    rows: dict[str, Row] = {}
    for method in methods:
        if method.title in gaps:
            continue
        shipped = _row(method, found[method.title], float(reference.value), spread)
        rows[method.title] = shipped
        if method.independent and ACCURACY < shipped.error < math.inf:
            enough = math.ceil((spread / ACCURACY) ** 2)
            title = f"{method.title}, to 2 %"
            seconds[title] = [
                s * enough / traced.products
                for s, traced in zip(seconds[method.title], found[method.title], strict=True)
            ]
            note = f"{enough} samples are a standard error of 2 %; computed from the time of each"
            rows[title] = Row(method.kind, error=ACCURACY, products=enough, note=note)
    gradients = turns.seconds[_GRADIENT]
    by_ours = [m.title for m in methods if m.kind == "ours" and m.title in rows]
    return Cell(
        title=f"{asked.case.title.rpartition(',')[0]}, {examples} images: the trace is "
        f"{float(reference.value):.5g}, standard error {float(reference.stderr):.2g}",
        rounds=len(gradients),
        gradient=statistics.median(gradients),
        tolerance=ACCURACY,
        rows={
            title: replace(
                row,
                gradients=ratio(seconds[title], gradients),
                ours={o: ratio(seconds[o], seconds[title]) for o in by_ours if o != title},
            )
            for title, row in rows.items()
        },
        gaps=gaps,
    )


def _methods() -> list[_Method]:
    """Return the methods; each of ours also by torch's matrix library, if it has another."""
    both: list[_Method] = []
    for method in METHODS:
        both.append(method)
        if method.kind == "ours" and ours.has_other_library():
            estimate = ours.by_torch(method.estimate)
            both.append(replace(method, title=f"{method.title}{BY_TORCH}", estimate=estimate))
    return both


def _run(
    asked: Asked, methods: Sequence[_Method], effort: Effort
) -> tuple[Turns, Mapping[str, list[Traced]], dict[str, str]]:
    """A round for each seed."""
    found: dict[str, list[Traced]] = {method.title: [] for method in methods}
    gaps: dict[str, str] = {}

    def call(method: _Method) -> None:
        try:
            if method.title not in gaps:
                seed = len(found[method.title])
                found[method.title].append(method.estimate(asked.own(), seed))
        except Exception as broken:
            gaps[method.title] = reason_of(broken)

    calls = {method.title: partial(call, method) for method in methods}
    turns = Turns({_GRADIENT: partial(gradient_of, asked), **calls})
    gradient_of(asked)
    for _ in range(effort.least):
        turns.take()
    return turns, found, gaps


def _row(method: _Method, found: Sequence[Traced], reference: float, spread: float) -> Row:
    """With the median error over seeds, or that of so many samples: a few are right by chance."""
    products = statistics.median(traced.products for traced in found)
    error = statistics.median(abs(traced.value / reference - 1) for traced in found)
    if method.independent:
        error = max(error, spread / math.sqrt(products))
    return Row(method.kind, error=error, products=products, note=method.rule)


def _relative_spread(found: Mapping[str, Sequence[Traced]], reference: float) -> float:
    """The standard deviation of a sample, over the trace."""
    samples = [x for every in found.values() for traced in every for x in traced.samples]
    return statistics.stdev(samples) / abs(reference) if len(samples) > 1 else math.inf


def _reference(asked: Asked) -> hf.results.Estimate:
    matvec, params = ours.matvec_of(_in_parts(asked))
    return hf.xtrace(
        matvec, params, rtol=_INTERVAL * ACCURACY / 3, max_matvecs=400, seed=_REFERENCE_SEED
    )


def _in_parts(asked: Asked) -> Asked:
    cut = (x.split(_MICROBATCH) for x in (asked.case.inputs, asked.case.targets))
    return replace(asked, batches=list(zip(*cut, strict=True)))


def _hessian_trace(asked: Asked, seed: int) -> Traced:
    loss, params, parts = ours.loss_of(_in_parts(asked))
    found = hf.hessian_trace(
        loss, params, parts, rtol=_INTERVAL * ACCURACY, max_matvecs=2000, keep=True, seed=seed
    )
    return Traced(float(found.value), found.matvecs)


def _xtrace(asked: Asked, seed: int) -> Traced:
    matvec, params = ours.matvec_of(_in_parts(asked))
    found = hf.xtrace(matvec, params, rtol=_INTERVAL * ACCURACY, max_matvecs=2000, seed=seed)
    return Traced(float(found.value), found.matvecs)


def _pyhessian(asked: Asked, seed: int) -> Traced:
    made = pyhessian.hessian_of(asked)
    with seeded(seed):
        samples = made.trace()
    # The gradients hold the graph, and are held by it.
    asked.case.model.zero_grad()
    return Traced(statistics.mean(samples), len(samples), samples)


def _eigenthings(asked: Asked, seed: int, *, method: str, products: int) -> Traced:
    from hessian_eigenthings.algorithms import trace as estimate

    operator = eigenthings.operator_of(asked)
    found = estimate(operator, num_matvecs=products, method=method, seed=seed)
    samples = found.samples.tolist() if method == "hutchinson" else ()
    return Traced(float(found.estimate), products, samples)


def _curvlinops(asked: Asked, seed: int, *, name: str, products: int) -> Traced:
    from curvlinops.trace import epperly2024xtrace, hutchinson

    estimate = {"xtrace": epperly2024xtrace.xtrace, "hutchinson": hutchinson.hutchinson_trace}
    with seeded(seed):
        # Blocks through all images at once do not fit in memory.
        value = estimate[name](curvlinops.operator_of(_in_parts(asked)), products)
    return Traced(float(value), products)


_FEW = 16
# About what ours takes: it has no rule of its own.
_BUDGET = 60

METHODS = [
    _Method(
        "hessfunc, hessian_trace",
        "hessfunc",
        "ours",
        _hessian_trace,
        "exact for the Gauss-Newton matrix; stops at a standard error of 2 %",
    ),
    _Method("hessfunc, xtrace", "hessfunc", "ours", _xtrace, "stops at a standard error of 2 %"),
    _Method(
        "PyHessian, trace",
        "PyHessian",
        "peer",
        _pyhessian,
        "as shipped: tol=1e-3, the change of the running mean",
        independent=True,
    ),
    _Method(
        "hessian-eigenthings, hutch++",
        "hessian-eigenthings",
        "peer",
        partial(_eigenthings, method="hutch++", products=99),
        "as shipped: num_matvecs=100",
    ),
    _Method(
        "hessian-eigenthings, hutchinson",
        "hessian-eigenthings",
        "peer",
        partial(_eigenthings, method="hutchinson", products=_FEW),
        f"{_FEW} samples",
        independent=True,
    ),
    _Method(
        "curvlinops, hutchinson_trace",
        "curvlinops-for-pytorch",
        "peer",
        partial(_curvlinops, name="hutchinson", products=_FEW),
        f"{_FEW} samples",
        independent=True,
    ),
    _Method(
        "curvlinops, xtrace",
        "curvlinops-for-pytorch",
        "peer",
        partial(_curvlinops, name="xtrace", products=_BUDGET),
        f"told to take {_BUDGET} products",
    ),
]
