"""Schedules of batch sizes: constant, or adaptive with adversarial training (ABSA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from hessfunc.options import at_least, validated


@dataclass(frozen=True, kw_only=True)
class ScheduleState:
    """What holds for the next epoch.

    Attributes:
        epoch: epochs so far.
        ratio: how many base batches make one step.
        adversarial_share: how much of each base batch is made adversarial.
        lr_factor: what the initial learning rate is multiplied by.
        reference: the eigenvalue that the next ones are compared with; None before the first.
        waited: epochs with an eigenvalue since the batch grew.
        watching: whether ``after_epoch`` needs an eigenvalue.
    """

    epoch: int = 0
    ratio: int = 1
    adversarial_share: float = 0.0
    lr_factor: float = 1.0
    reference: float | None = None
    waited: int = 0
    watching: bool = False


@dataclass(frozen=True)
class Schedule:
    """The two functions of a schedule, both pure.

    Attributes:
        init: ``() -> state``.
        after_epoch: ``(state, eigenvalue) -> state``; the eigenvalue may be None where the state
            is not watching.
    """

    init: Callable[[], ScheduleState]
    after_epoch: Callable[[ScheduleState, float | None], ScheduleState]


@validated
def absa(
    *,
    epochs: int = 90,
    max_ratio: int = 128,
    factor: int = 2,
    adversarial_share: float = 0.2,
    patience: int = 10,
    lr_decay: float = 0.2,
    lr_decay_epochs: Collection[int] = (30, 60),
) -> Schedule:
    """Batches that grow where the loss is flat, with adversarial examples until they are large.

    R base batches make one step, R = 1 at first, and a share of each base batch is adversarial.
    The first eigenvalue, of the Hessian after an epoch, is the reference. When

        |eigenvalue| <= |reference| / factor,

    it is the new reference, and R and the learning rate are multiplied by the factor, the share
    divided by it. The same without a new reference where R has not grown for ``patience`` epochs.
    R ends at ``max_ratio``: the share is 0 then, and no eigenvalue is needed. From half of the
    epochs on the share is 0, too.

    Args:
        epochs: of the training.
        max_ratio: the most base batches that make one step.
        factor: of growth.
        adversarial_share: to start with.
        patience: epochs until the batch grows in any case.
        lr_decay: the learning rate is multiplied by it,
        lr_decay_epochs: after each of these epochs, counted from 1.

    Returns:
        `Schedule`. Its ``after_epoch`` takes the dominant eigenvalue of the Hessian.

    Raises:
        ValueError: an option is out of range, or no whole number; (from ``after_epoch``) an
            eigenvalue is needed and there is none, or it is not finite.

    Source: Yao, Gholami, Keutzer and Mahoney 2018, arXiv 1810.01021.
    """
    at_least(1, epochs=epochs, max_ratio=max_ratio, patience=patience)
    at_least(2, factor=factor)
    _whole(epochs=epochs, max_ratio=max_ratio, patience=patience, factor=factor)
    if not 0 <= adversarial_share <= 1:
        raise ValueError(f"adversarial_share={adversarial_share}: it must be in [0, 1]")
    decayed = _decay(lr_decay, lr_decay_epochs)

    def init() -> ScheduleState:
        start = ScheduleState(adversarial_share=adversarial_share, watching=max_ratio > 1)
        return until_half_way(start)

    def until_half_way(state: ScheduleState) -> ScheduleState:
        return state if state.epoch < epochs // 2 else replace(state, adversarial_share=0.0)

    def grown(state: ScheduleState) -> ScheduleState:
        ratio = min(factor * state.ratio, max_ratio)
        return replace(
            state,
            ratio=ratio,
            adversarial_share=state.adversarial_share / factor if ratio < max_ratio else 0.0,
            lr_factor=state.lr_factor * ratio / state.ratio,
            waited=0,
            watching=ratio < max_ratio,
        )

    def seen(state: ScheduleState, eigenvalue: float) -> ScheduleState:
        state = replace(state, waited=state.waited + 1)
        if state.reference is None:
            state = replace(state, reference=eigenvalue)
        # From a reference of 0 nothing can fall.
        elif abs(eigenvalue) <= abs(state.reference) / factor < abs(state.reference):
            return grown(replace(state, reference=eigenvalue))
        return grown(state) if state.waited >= patience else state

    def after_epoch(state: ScheduleState, eigenvalue: float | None) -> ScheduleState:
        if state.watching:
            state = seen(state, _finite(eigenvalue))
        return until_half_way(decayed(state))

    return Schedule(init, after_epoch)


def constant(
    *, ratio: int = 1, lr_decay: float = 1.0, lr_decay_epochs: Collection[int] = ()
) -> Schedule:
    """Batches of one size, without adversarial examples.

    Args:
        ratio: how many base batches make one step.
        lr_decay: the learning rate is multiplied by it,
        lr_decay_epochs: after each of these epochs, counted from 1.

    Raises:
        ValueError: an option is out of range, or no whole number.
    """
    at_least(1, ratio=ratio)
    _whole(ratio=ratio)
    decayed = _decay(lr_decay, lr_decay_epochs)
    return Schedule(lambda: ScheduleState(ratio=ratio), lambda state, eigenvalue: decayed(state))


def _decay(
    lr_decay: float, lr_decay_epochs: Collection[int]
) -> Callable[[ScheduleState], ScheduleState]:
    """The state after one more epoch, with its decay of the learning rate."""
    if not (lr_decay > 0 and math.isfinite(lr_decay)):
        raise ValueError(f"lr_decay={lr_decay}: it must be positive and finite")

    def decayed(state: ScheduleState) -> ScheduleState:
        epoch = state.epoch + 1
        decay = lr_decay if epoch in lr_decay_epochs else 1.0
        return replace(state, epoch=epoch, lr_factor=state.lr_factor * decay)

    return decayed


def _whole(**options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, int):
            raise ValueError(f"{name}={value}: it must be a whole number")


def _finite(eigenvalue: float | None) -> float:
    if eigenvalue is None or not math.isfinite(eigenvalue):
        raise ValueError(
            f"the eigenvalue after the epoch is {eigenvalue}: a schedule that is watching needs a "
            "finite one"
        )
    return eigenvalue
