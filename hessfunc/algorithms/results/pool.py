"""Weighted means of independent estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hessfunc.algorithms.results.estimate import Estimate
from hessfunc.algorithms.statistics import student_quantile
from hessfunc.options import validated

# Probability with which `pool` refuses estimates that agree, as contradicting each other.
_CHANCE = 1e-9


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
            therefore their probes, or if there are no weights and two estimates, or their squared
            Frobenius norms, differ by more than their standard errors explain.
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
        norms = [e.squared_frobenius for e in estimates if e.squared_frobenius is not None]
        if len(norms) == len(estimates):
            _refuse_contradictions(norms, "squared Frobenius norms ")
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


def _refuse_contradictions(estimates: Sequence[Estimate], what: str = "", /) -> None:
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
        f"{what}{one.value:.6g} with the standard error {one.stderr:.2g}, and {other.value:.6g} "
        f"with {other.stderr:.2g}. Pool estimates of one matrix, or, for different batches, pass "
        "their numbers of examples as weights, such as pool(estimates, [64, 64])"
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
