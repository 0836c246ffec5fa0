from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from hessfunc.app.problems import data
from hessfunc.app.problems.nets import digits_convnet
from hessfunc.optim.schedules import Schedule, ScheduleState, absa, constant
from hessfunc.training.loop import Record
from hessfunc.training.methods import SGD
from hessfunc.training.runs import run


def after(schedule: Schedule, *eigenvalues: float | None) -> list[ScheduleState]:
    """The states from the start on, after one epoch each."""
    states = [schedule.init()]
    for eigenvalue in eigenvalues:
        states.append(schedule.after_epoch(states[-1], eigenvalue))
    return states


def test_the_defaults_are_those_of_the_literature() -> None:
    start = ScheduleState(
        epoch=0,
        ratio=1,
        adversarial_share=0.2,
        lr_factor=1.0,
        reference=None,
        waited=0,
        watching=True,
    )
    assert absa().init() == start
    # The first eigenvalue is the reference, and patience runs out after ten of them.
    *_, nine, ten = after(absa(), 8.0, *(4.1,) * 9)
    assert nine == replace(start, epoch=9, reference=8.0, waited=9)
    grown = replace(start, epoch=10, reference=8.0, ratio=2, adversarial_share=0.1, lr_factor=2.0)
    assert ten == grown
    # A half of the reference is enough, and is the new one.
    assert absa().after_epoch(nine, 4.0) == replace(grown, reference=4.0)
    # Epochs 30 and 60 lower the learning rate, and epoch 45 ends the adversarial examples.
    late = replace(grown, epoch=29)
    assert absa().after_epoch(late, 8.0).lr_factor == 0.4
    assert absa().after_epoch(replace(late, epoch=30), 8.0).lr_factor == 2.0
    assert absa().after_epoch(replace(late, epoch=59), 8.0).lr_factor == 0.4
    assert absa().after_epoch(replace(late, epoch=43), 8.0).adversarial_share == 0.1
    assert absa().after_epoch(replace(late, epoch=44), 8.0).adversarial_share == 0.0
    # The cap is 128.
    large = absa().after_epoch(replace(late, ratio=64), 1.0)
    assert (large.ratio, large.watching, large.adversarial_share) == (128, False, 0.0)


def test_growth_patience_cap_decay_and_half_way_by_hand() -> None:
    schedule = absa(
        epochs=16,
        max_ratio=5,
        factor=2,
        adversarial_share=0.4,
        patience=3,
        lr_decay=0.5,
        lr_decay_epochs=(4, 7),
    )
    found = after(schedule, 10.0, 6.0, 5.0, 5.0, 4.0, 3.0, 2.4, None, None)
    facts = [
        (s.epoch, s.ratio, s.adversarial_share, s.lr_factor, s.reference, s.waited, s.watching)
        for s in found
    ]
    assert facts == [
        (0, 1, 0.4, 1.0, None, 0, True),
        (1, 1, 0.4, 1.0, 10.0, 1, True),
        (2, 1, 0.4, 1.0, 10.0, 2, True),
        # A half of the reference comes before patience.
        (3, 2, 0.2, 2.0, 5.0, 0, True),
        # The learning rate decays.
        (4, 2, 0.2, 1.0, 5.0, 1, True),
        (5, 2, 0.2, 1.0, 5.0, 2, True),
        # Patience runs out: the reference stays.
        (6, 4, 0.1, 2.0, 5.0, 0, True),
        # The cap is no power of two; growth and decay at once.
        (7, 5, 0.0, 2.0 * 5 / 4 * 0.5, 2.4, 0, False),
        (8, 5, 0.0, 1.25, 2.4, 0, False),
        (9, 5, 0.0, 1.25, 2.4, 0, False),
    ]


def test_half_way_ends_the_adversarial_examples_and_not_the_growth() -> None:
    found = after(absa(epochs=5, max_ratio=8, lr_decay_epochs=()), 8.0, 7.0, 4.0, 2.0, 1.0)
    assert [s.adversarial_share for s in found] == [0.2, 0.2, 0.0, 0.0, 0.0, 0.0]
    assert [s.ratio for s in found] == [1, 1, 1, 2, 4, 8]
    assert [s.lr_factor for s in found] == [1, 1, 1, 2, 4, 8]


def test_patience_counts_epochs_since_the_last_growth() -> None:
    found = after(absa(patience=2, lr_decay_epochs=()), 8.0, 8.0, 8.0, 4.0, 4.0, 4.0)
    assert [s.ratio for s in found] == [1, 1, 2, 2, 4, 4, 8]
    assert [s.waited for s in found] == [0, 1, 0, 1, 0, 1, 0]
    assert [s.reference for s in found[1:]] == [8, 8, 8, 4, 4, 4]


def test_the_size_of_an_eigenvalue_counts_not_its_sign() -> None:
    schedule = absa(lr_decay_epochs=())
    assert after(schedule, -8.0, -6.0)[-1].ratio == 1
    assert after(schedule, -8.0, 4.0)[-1].ratio == 2
    assert after(schedule, 8.0, -8.0)[-1].ratio == 1


def test_the_eigenvalue_has_to_fall_by_the_factor() -> None:
    schedule = absa(factor=4, lr_decay_epochs=())
    assert after(schedule, 8.0, 2.1)[-1].ratio == 1
    assert after(schedule, 8.0, 2.0)[-1].ratio == 4


def test_nothing_falls_from_zero() -> None:
    found = after(absa(lr_decay_epochs=()), 0.0, 0.0, 0.0)
    assert [s.ratio for s in found] == [1, 1, 1, 1]


def test_a_single_epoch_is_past_half_way() -> None:
    assert absa(epochs=1).init().adversarial_share == 0
    assert absa(epochs=2).init().adversarial_share == 0.2


def test_a_cap_of_one_watches_nothing() -> None:
    found = after(absa(max_ratio=1, epochs=4, lr_decay_epochs=(1,)), None, None)
    assert [(s.ratio, s.watching, s.lr_factor) for s in found] == [
        (1, False, 1.0),
        (1, False, 0.2),
        (1, False, 0.2),
    ]
    assert [s.adversarial_share for s in found] == [0.2, 0.2, 0.0]


def test_a_constant_schedule_only_decays() -> None:
    found = after(constant(ratio=4, lr_decay=0.5, lr_decay_epochs=(2,)), None, 3.0, None)
    assert found == [
        ScheduleState(epoch=epoch, ratio=4, lr_factor=factor)
        for epoch, factor in ((0, 1.0), (1, 1.0), (2, 0.5), (3, 0.5))
    ]


def test_states_are_not_changed() -> None:
    schedule = absa()
    state = schedule.init()
    schedule.after_epoch(state, 3.0)
    assert state == schedule.init()


@pytest.mark.parametrize("eigenvalue", [None, float("nan"), float("inf")])
def test_an_eigenvalue_that_is_needed_must_be_finite(eigenvalue: float | None) -> None:
    with pytest.raises(ValueError, match="pass a finite eigenvalue"):
        absa().after_epoch(absa().init(), eigenvalue)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0: it must be at least 1"),
        ({"max_ratio": 0}, "max_ratio=0"),
        ({"patience": 0}, "patience=0"),
        ({"factor": 1}, "factor=1: it must be at least 2"),
        ({"factor": 2.5}, "factor=2.5: it must be a whole number"),
        ({"max_ratio": 2.5}, "max_ratio=2.5: it must be a whole number"),
        ({"adversarial_share": 1.5}, "must be in"),
        ({"lr_decay": 0.0}, "lr_decay=0.0: the factor must be positive"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        absa(**options)


def test_a_constant_schedule_refuses_them_too() -> None:
    with pytest.raises(ValueError, match="ratio=0"):
        constant(ratio=0)
    with pytest.raises(ValueError, match=r"ratio=1.5: it must be a whole number"):
        constant(ratio=1.5)
    with pytest.raises(ValueError, match="lr_decay=inf"):
        constant(lr_decay=float("inf"))


@pytest.mark.slow
def test_on_digits_it_is_as_accurate_as_sgd_with_fewer_updates() -> None:
    pytest.importorskip("sklearn")
    digits = data.digits()
    sets = digits[:1500], digits[1500:]
    # Patience does not run out: whatever grows does so by the eigenvalue.
    adaptive = absa(epochs=12, max_ratio=8, patience=12, lr_decay_epochs=())
    ends: dict[str, list[Record]] = {"SGD": [], "ABSA": []}
    for seed in range(3):
        for method, schedule in (("SGD", None), ("ABSA", adaptive)):
            found = run(
                method,
                digits_convnet,
                SGD(lr=0.1),
                *sets,
                epochs=12,
                batch_size=32,
                seed=seed,
                schedule=schedule,
            )
            assert found.ended == "complete"
            ends[method].append(found.records[-1])
    plain, grown = ends["SGD"], ends["ABSA"]
    assert {record.step for record in plain} == {12 * 47}
    assert max(record.step for record in grown) < 0.75 * 12 * 47
    assert min(record.ratio for record in grown) >= 4
    accuracies = (mean(r.test_accuracy or 0 for r in records) for records in (grown, plain))
    assert next(accuracies) > next(accuracies) - 0.01
