"""One training from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from hessfunc.problems.data import Examples
from hessfunc.problems.training import seeded
from hessfunc.training.history import Run
from hessfunc.training.loop import train
from hessfunc.training.methods import Method

__all__ = ["run"]


def run(
    name: str,
    make_model: Callable[[], nn.Module],
    method: Method,
    examples: Examples,
    test: Examples | None = None,
    /,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    minutes: float | None = None,
    device: torch.device | None = None,
    callback: Callable[[Run], object] | None = None,
) -> Run:
    """A training whose weights, batches and draws are functions of the seed.

    Two methods with the same seed start from the same weights and see the same batches.

    Args:
        name: of the method, for tables.
        make_model: builds the untrained model.
        method: how it is trained.
        examples: to train on; they lie on the device.
        test: examples to evaluate on, beside.
        epochs: passes over the examples.
        batch_size: examples a step.
        seed: of all that is random; torch's own stream stays as it was.
        minutes: end after so much time of steps.
        device: where to train; by default where the model is made.
        callback: called with the running training after each record.

    Returns:
        `Run`. Where numbers are no longer finite it ends there, and says so.
    """
    with seeded(seed):
        model = make_model().to(device)
    found = Run(method=name, seed=seed, ended="running", records=())
    try:
        for record in train(
            model,
            method.steps(model, seed=seed),
            examples,
            test=test,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            minutes=minutes,
        ):
            found = replace(found, records=(*found.records, record))
            if callback is not None:
                callback(found)
    except (FloatingPointError, ValueError) as error:
        if not found.records:
            raise
        return replace(found, ended=str(error))
    reached = found.records[-1].epoch >= epochs
    return replace(found, ended="complete" if reached else "time is up")
