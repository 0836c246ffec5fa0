"""Schedules of batch sizes: constant, or adaptive with adversarial training (ABSA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from hessfunc.options import at_least, validated


@dataclass(frozen=True, kw_only=True)
class ScheduleState:
    """Settings of the next epoch.

    Attributes:
        epoch: Number of epochs so far.
        ratio: Number of base batches in one step.
        adversarial_share: Fraction of each base batch that is made adversarial.
        lr_factor: Factor of the initial learning rate.
        reference: Eigenvalue to which later ones are compared; None before the first one.
        waited: Number of epochs with an eigenvalue since the batch last grew.
        watching: Whether ``after_epoch`` needs an eigenvalue.
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
    """Schedule as a pair of pure functions.

    Attributes:
        init: Function ``() -> state``.
        after_epoch: Function ``(state, eigenvalue) -> state``. The eigenvalue may be None if
            ``state.watching`` is False.
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
    """Grow the batch when the loss becomes flat, with adversarial examples until it is large.

    R base batches make one step, with R = 1 at first. A share of each base batch is adversarial.
    The first dominant eigenvalue of the Hessian after an epoch is the reference. Whenever

        |eigenvalue| <= |reference| / factor,

    the eigenvalue becomes the new reference, R and the learning rate are multiplied by the factor,
    and the share is divided by it. If R has not grown for ``patience`` epochs, they change in the
    same way, but the reference is kept. When R reaches ``max_ratio``, the share is 0 and no further
    eigenvalues are needed. The share is also 0 in the second half of the epochs.

    Args:
        epochs: Number of epochs of the training.
        max_ratio: Largest number of base batches in one step.
        factor: Growth factor of R.
        adversarial_share: Initial fraction of each base batch that is adversarial.
        patience: Number of epochs after which the batch grows in any case.
        lr_decay: Factor of the learning rate after each epoch in ``lr_decay_epochs``.
        lr_decay_epochs: Epochs after which the learning rate decays, counted from 1.

    Returns:
        A `Schedule`. Its ``after_epoch`` takes the dominant eigenvalue of the Hessian.

    Raises:
        ValueError: If an option is out of range or not an integer. ``after_epoch`` raises it if an
            eigenvalue is needed and is missing or not finite.

    Source: Yao, Gholami, Keutzer and Mahoney 2018, arXiv 1810.01021.
    """
    at_least(1, epochs=epochs, max_ratio=max_ratio, patience=patience)
    at_least(2, factor=factor)
    _whole(epochs=epochs, max_ratio=max_ratio, patience=patience, factor=factor)
    if not 0 <= adversarial_share <= 1:
        raise ValueError(f"adversarial_share={adversarial_share}: the share must be in [0, 1]")
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
        # The strict inequality excludes a reference of 0, below which nothing can fall.
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
    """Schedule with a constant batch size and without adversarial examples.

    Args:
        ratio: Number of base batches in one step.
        lr_decay: Factor of the learning rate after each epoch in ``lr_decay_epochs``.
        lr_decay_epochs: Epochs after which the learning rate decays, counted from 1.

    Raises:
        ValueError: If an option is out of range or not an integer.
    """
    at_least(1, ratio=ratio)
    _whole(ratio=ratio)
    decayed = _decay(lr_decay, lr_decay_epochs)
    return Schedule(lambda: ScheduleState(ratio=ratio), lambda state, eigenvalue: decayed(state))


def _decay(
    lr_decay: float, lr_decay_epochs: Collection[int]
) -> Callable[[ScheduleState], ScheduleState]:
    """Return the function that counts one epoch and decays the learning rate of a state."""
    if not (lr_decay > 0 and math.isfinite(lr_decay)):
        raise ValueError(f"lr_decay={lr_decay}: the factor must be positive and finite")

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
            f"the eigenvalue after the epoch is {eigenvalue}: pass a finite eigenvalue while "
            "`state.watching` is True"
        )
    return eigenvalue
