"""The trace by independent probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.results import Estimate, narrow_enough
from hessfunc.algorithms.rounds import Callback, Products, at_least, drawn, drive, rows_dtype
from hessfunc.trees import Matvec, ProbeKind, Tree

__all__ = ["hutchinson"]

# An interval of fewer samples is not trusted to stop a run: their variance is itself too noisy.
_FEWEST_SAMPLES = 10


def hutchinson(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    kind: ProbeKind = "signs",
    block_size: int = 10,
    seed: int | None = None,
    callback: Callback[Estimate] | None = None,
) -> Estimate:
    """The trace of a matrix, by random probes (Girard-Hutchinson).

        tr A = E[w'Aw],  E[ww'] = I

    estimated by the mean over probes, with a Student interval. The variance of one probe is
    2 (|A|_F^2 - sum_i a_ii^2) for signs, 2 |A|_F^2 for normal probes, and
    2 n / (n + 2) (|A|_F^2 - tr(A)^2 / n) for the sphere, for a symmetric A.

    Args:
        matvec: block -> block.
        like: a tree that says what vectors look like.
        rtol: stop when the half-width of the 95 % interval is below rtol |value|.
        atol: stop when it is below atol. Without rtol and atol the whole budget is used.
        max_matvecs: the budget: so many probes at the most.
        kind: ``"signs"``, ``"normal"`` or ``"sphere"``.
        block_size: how many probes are multiplied at once.
        seed: of the probes.
        callback: called with the running `Estimate` after each round; returning True stops.

    Returns:
        `Estimate`, with the part of each leaf in ``by_leaf``.

    Raises:
        ValueError: an option is out of range.
        FloatingPointError: a product is not finite.

    Cost: one matvec a probe.

    Source: Girard 1989; Hutchinson 1990.
    """
    products = Products.of(matvec, like)
    space = products.space
    at_least(0, rtol=rtol, atol=atol)
    at_least(2, max_matvecs=max_matvecs)
    at_least(1, block_size=block_size)
    seed = drawn(seed)

    def step(state: _State, room: int) -> _State:
        first = len(state.parts)
        indices = range(first, first + min(room, block_size))
        probes = space.probes(indices, kind=kind, seed=seed, dtype=rows_dtype(space))
        parts = space.by_leaf(probes, products(probes)).cpu().double()
        return _State(torch.cat([state.parts, parts]))

    def found(state: _State, reason: str) -> Estimate:
        samples = state.parts.sum(1)
        parts = state.parts.mean(0)
        return Estimate(
            value=float(samples.mean()),
            stderr=float(samples.std()) / len(samples) ** 0.5,
            samples=samples,
            by_leaf=dict(zip(space.names, parts.tolist(), strict=True)),
            matvecs=products.matvecs,
            passes=products.passes,
            reason=reason,
            seed=seed,
        )

    def verdict(state: _State) -> str | None:
        if len(state.parts) < _FEWEST_SAMPLES or (rtol is None and atol is None):
            return None
        return narrow_enough(found(state, "running"), rtol, atol)

    state, reason = drive(
        _State(torch.zeros(0, len(space.names), dtype=torch.float64)),
        products=products,
        step=step,
        verdict=verdict,
        running=lambda state: found(state, "running"),
        max_matvecs=max_matvecs,
        callback=callback,
    )
    return found(state, reason)


@dataclass(frozen=True)
class _State:
    """The samples ``w'Aw`` so far, leaf by leaf: float64 ``(p, leaves)``."""

    parts: Tensor
