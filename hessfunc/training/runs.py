"""Run one training from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from hessfunc.losses import supervised
from hessfunc.modules import functional
from hessfunc.optim.adversarial import Attack, fgsm
from hessfunc.optim.schedules import Schedule
from hessfunc.randomness import seeded
from hessfunc.training.checkpoint import TrainingCheckpoint
from hessfunc.training.dominant import Watch, watch
from hessfunc.training.examples import Examples
from hessfunc.training.history import Run
from hessfunc.training.loop import train
from hessfunc.training.methods import Method
from hessfunc.training_mode import eval_mode

Track: TypeAlias = Literal["top", "full"] | None

EXAMPLES_WATCHED = 200

_WATCHED_AT_ONCE = 500


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
    schedule: Schedule | None = None,
    eps: float = 0.005,
    track: Track = None,
    checkpoint: TrainingCheckpoint | None = None,
    callback: Callable[[Run], object] | None = None,
    on_step: Callable[[int], object] | None = None,
) -> Run:
    """Run a training whose weights, batches and draws are functions of the seed.

    Two methods with the same seed start from the same weights and see the same batches.

    Args:
        name: Name of the method, for tables.
        make_model: Function that builds the untrained model.
        method: Optimisation method.
        examples: Examples to train on, on the device.
        test: Examples for an additional evaluation.
        epochs: Number of passes over the examples.
        batch_size: Number of examples in a base batch.
        seed: Seed of all random numbers. Torch's own stream does not change.
        minutes: Time limit for the steps, in minutes.
        device: Device of the training. By default the device on which the model is built.
        schedule: Schedule of the batch size; constant by default. If it needs eigenvalues, they are
            measured on the first examples: `EXAMPLES_WATCHED` of them, or a base batch if this is
            larger.
        eps: Step size of the adversarial examples, in units of the inputs.
        track: Whether to record the dominant eigenvalue after each epoch: of the first examples
            (``"top"``), of all examples (``"full"``), or not at all (None). The schedule uses the
            same eigenvalue.
        checkpoint: Checkpoint that keeps the state, from which an interrupted run is resumed.
        callback: Function called with the `Run` so far after each record.
        on_step: Function called after each step with the number of examples so far in the epoch.

    Returns:
        A `Run`. If a number is not finite, the run ends there with the error in ``ended``.
    """
    with seeded(seed):
        model = make_model().to(device)
    result = Run(method=name, seed=seed, ended="running", records=())
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
            schedule=schedule,
            attack=_fgsm(model, eps),
            watch=_watch(model, examples, batch_size, seed, full=track == "full"),
            track=track is not None,
            checkpoint=checkpoint,
            on_step=on_step,
        ):
            result = replace(result, records=(*result.records, record))
            if callback is not None:
                callback(result)
    except ValueError as error:
        if not result.records:
            raise
        return replace(result, ended=str(error))
    reached = result.records[-1].epoch >= epochs
    return replace(result, ended="complete" if reached else "time is up")


def _fgsm(model: nn.Module, eps: float) -> Attack:
    with eval_mode(model):
        model_fn, params = functional(model)
    return partial(fgsm, supervised(model_fn, F.cross_entropy), params, eps=eps)


def _watch(
    model: nn.Module, examples: Examples, batch_size: int, seed: int, *, full: bool
) -> Watch:
    count = len(examples) if full else max(EXAMPLES_WATCHED, batch_size)
    return watch(model, examples[:count].batches(_WATCHED_AT_ONCE), seed=seed)
