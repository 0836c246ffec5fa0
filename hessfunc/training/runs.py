"""One training from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from hessfunc.losses import supervised
from hessfunc.modules import eval_mode, functional
from hessfunc.optim.adversarial import Attack, fgsm
from hessfunc.optim.schedules import Schedule
from hessfunc.training.checkpoint import TrainingCheckpoint
from hessfunc.training.dominant import Watch, watch
from hessfunc.training.examples import Examples
from hessfunc.training.history import Run
from hessfunc.training.loop import train
from hessfunc.training.methods import Method
from hessfunc.training.stream import seeded

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
        schedule: of the batch size; by default constant. Where it needs eigenvalues, they are
            those of the first examples, `EXAMPLES_WATCHED` or a base batch if that is more.
        eps: how far the inputs of its adversarial examples are moved.
        track: record the dominant eigenvalue after each epoch, of these first examples
            (``"top"``) or of all (``"full"``), which is then the schedule's, too.
        checkpoint: where the state is kept, for a run that was killed to go on from.
        callback: called with the running training after each record.
        on_step: called after each step with the examples so far of the epoch.

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
            schedule=schedule,
            attack=_fgsm(model, eps),
            watch=_watch(model, examples, batch_size, seed, full=track == "full"),
            track=track is not None,
            checkpoint=checkpoint,
            on_step=on_step,
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


def _fgsm(model: nn.Module, eps: float) -> Attack:
    with eval_mode(model):
        model_fn, params = functional(model)
    return partial(fgsm, supervised(model_fn, F.cross_entropy), params, eps=eps)


def _watch(
    model: nn.Module, examples: Examples, batch_size: int, seed: int, *, full: bool
) -> Watch:
    count = len(examples) if full else max(EXAMPLES_WATCHED, batch_size)
    return watch(model, examples[:count].batches(_WATCHED_AT_ONCE), seed=seed)
