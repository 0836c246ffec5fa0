"""Work of steps, in gradients of a base batch."""

from __future__ import annotations

import pytest

from hessfunc.app.problems.nets import mlp
from hessfunc.optim.schedules import absa
from hessfunc.randomness import seeded
from hessfunc.training.cost import Measured, StepCost
from hessfunc.training.dominant import watch
from hessfunc.training.loop import train
from hessfunc.training.methods import SGD
from tests.training.blobs import blobs


def test_products_of_the_schedule_are_part_of_the_cost() -> None:
    model = mlp([2, 6, 2])
    schedule = absa(epochs=2, max_ratio=4, adversarial_share=0.0, lr_decay_epochs=())
    records = list(
        train(
            model,
            SGD().steps(model),
            blobs(),
            epochs=2,
            batch_size=20,
            schedule=schedule,
            watch=watch(model, blobs().batches(60), max_matvecs=10),
        )
    )
    assert 0 < records[1].matvecs <= 10
    assert records[1].gradients > 3


def test_the_unit_of_work_is_the_first_batch_however_small_the_last_one_is() -> None:
    def spent(count: int) -> float:
        with seeded(0):
            model = mlp([2, 6, 2])
        records = train(
            model,
            SGD().steps(model),
            blobs(count),
            epochs=1,
            batch_size=20,
            schedule=absa(epochs=1, max_ratio=4),
            attack=lambda batch: batch[0],
            watch=watch(model, blobs(60).batches(60), max_matvecs=5, rtol=0.0),
        )
        return list(records)[-1].gradients

    assert spent(61) == pytest.approx(spent(60) + 1)


def test_costs_add_up_but_for_the_peak_which_is_the_largest() -> None:
    first = StepCost(matvecs=2, gradients=1.5, seconds=0.5, peak_bytes=100)
    second = StepCost(matvecs=3, gradients=0.5, seconds=0.25, peak_bytes=70)
    assert first + second == StepCost(matvecs=5, gradients=2.0, seconds=0.75, peak_bytes=100)


def test_a_step_costs_the_gradients_that_it_makes() -> None:
    model = mlp([2, 8, 2])
    measured = Measured(SGD().steps(model))
    batches = blobs().batches(20)
    for count in (1, 3):
        _, cost = measured.step(batches[:count], count)
        assert cost.gradients == pytest.approx(count, rel=0.01)
        assert cost.matvecs == 0
    assert measured.peak > 0
