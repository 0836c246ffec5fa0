"""A training loop that tells what it has cost, and that goes on after it was killed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import nn

from hessfunc.optim.adversarial import Attack
from hessfunc.optim.schedules import Schedule, ScheduleState, constant
from hessfunc.tracking.undisturbed import refuse_busy_workers, undisturbed
from hessfunc.training.batches import Source, epochs_of, grouped, refuse_iterators
from hessfunc.training.checkpoint import TrainingCheckpoint
from hessfunc.training.cost import Cost, Measured
from hessfunc.training.dominant import Watch
from hessfunc.training.evaluation import evaluated
from hessfunc.training.examples import Examples
from hessfunc.training.steps import DIVERGED, Batch, Steps
from hessfunc.training.stream import Stream
from hessfunc.trees import Tree, tree_map


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where a training stands.

    Attributes:
        step: steps so far.
        epoch: passes over the training examples so far.
        loss: mean over all training examples.
        minibatch_loss: mean over the steps since the last record, each before it; None before the
            first.
        accuracy: on the training examples.
        test_loss: mean over the test examples; None where there are none.
        test_accuracy: on the test examples; None where there are none.
        matvecs: products so far.
        gradients: the work so far in gradient-equivalents: the floating-point operations of
            products, convolutions and decompositions of matrices, over those of one gradient of
            the first base batch. A step of SGD is one for each of its base batches.
        seconds: of the steps so far, without the evaluations.
        peak_bytes: memory that tensors made during a step have held at most: on the CPU during
            the first, on CUDA during any.
        ratio: base batches in a step of this epoch.
        adversarial_share: how much of them was adversarial.
        lr: the learning rate of this epoch.
        eigenvalue: the dominant one after the epoch; None where it was not measured.
    """

    step: int
    epoch: float
    loss: float
    minibatch_loss: float | None
    accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    matvecs: int
    gradients: float
    seconds: float
    peak_bytes: int
    ratio: int = 1
    adversarial_share: float = 0.0
    lr: float | None = None
    eigenvalue: float | None = None


def train(
    model: nn.Module,
    steps: Steps,
    source: Source,
    /,
    *,
    epochs: int,
    batch_size: int = 128,
    seed: int = 0,
    test: Source | None = None,
    schedule: Schedule | None = None,
    attack: Attack | None = None,
    watch: Watch | None = None,
    track: bool = False,
    every: int | None = None,
    minutes: float | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    on_step: Callable[[int], object] | None = None,
) -> Iterator[Record]:
    """Train a classifier, and yield a `Record` at the start, after each epoch, and at the end.

    As many base batches as the schedule says make one step; no step crosses an epoch. Order and
    draws are functions of the seed, those of a loader too, except from a generator of its own.
    Torch's random stream stays as it was, and evaluations are made in eval mode.

    Args:
        model: in the mode in which it is to be trained.
        steps: of its parameters.
        source: examples to train on, or a loader or list of batches ``(inputs, targets)``, which
            is read anew in each epoch and for each record.
        epochs: passes over them.
        batch_size: examples of a base batch; the last one of an epoch may be smaller. A loader
            has its own.
        seed: of the order and of what layers draw.
        test: examples to evaluate on, beside.
        schedule: of the batch size and the learning rate; by default one batch a step.
        attack: makes the adversarial examples of the schedule.
        watch: measures the eigenvalue of the schedule.
        track: measure it after each epoch, also where the schedule does not need it.
        every: also a record after so many steps.
        minutes: end after so much time of steps.
        checkpoint: where the state is kept. A training with the same settings goes on from it,
            yields the records from before again, and ends with the same bits.
        on_step: called after each step with the examples so far of the epoch.

    Raises:
        ValueError: there is no example, or an option is out of range, or missing; a source is an
            iterator, or a loader that keeps its workers and is read for records amid an epoch.
        FloatingPointError: the loss over all examples is not finite.
    """
    if epochs < 0 or batch_size < 1 or (isinstance(source, Examples) and not len(source)):
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}: epochs must not be negative, the other at "
            "least 1, and there must not be 0 examples"
        )
    refuse_iterators(source, test)
    if every:
        refuse_busy_workers(source)
    if checkpoint is not None and not isinstance(source, Examples):
        raise ValueError(
            "the order of a loader cannot be taken up again: with a checkpoint, train on Examples"
        )
    schedule = schedule or constant()
    first = schedule.init()
    if (first.watching or track) and watch is None:
        raise ValueError(
            "eigenvalues are needed: give watch=, as hessfunc.training.dominant makes it"
        )
    if first.adversarial_share and attack is None:
        raise ValueError(
            "the schedule needs adversarial examples: give attack=, such as one of fgsm"
        )
    training = _Training(
        model=model,
        steps=steps,
        source=source,
        test=test,
        schedule=schedule,
        attack=attack,
        watch=watch,
        track=track,
        epochs=epochs,
        every=every,
        limit=math.inf if minutes is None else 60 * minutes,
        checkpoint=checkpoint,
        on_step=on_step,
        stream=Stream.of(seed, next(model.parameters()).device),
        measured=Measured(steps),
        place=_Place(schedule=first),
    )
    training.go_on()
    yield from training.place.records
    if not training.place.records:
        yield training.recorded()
    orders = epochs_of(source, batch_size=batch_size, seed=seed)
    for order in islice(orders, training.place.schedule.epoch, epochs):
        if training.place.step and training.is_over():
            return
        yield from training.epoch(training.stream.each(order))


@dataclass(frozen=True, kw_only=True)
class _Place:
    """How far a training has come, and what it depends on besides model, steps and draws.

    Attributes:
        schedule: of the running epoch.
        batches: base batches of the running epoch so far.
        examples: those in them.
        step: steps so far.
        loss_sum: over the steps since the last record,
        loss_count: and how many these are.
        cost: so far.
        vectors: of the last eigenvalue.
        records: so far.
    """

    schedule: ScheduleState
    batches: int = 0
    examples: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    cost: Cost = field(default_factory=Cost)
    vectors: Tree | None = None
    records: tuple[Record, ...] = ()


@dataclass(kw_only=True)
class _Training:
    """A training that moves from place to place."""

    model: nn.Module
    steps: Steps
    source: Source
    test: Source | None
    schedule: Schedule
    attack: Attack | None
    watch: Watch | None
    track: bool
    epochs: int
    every: int | None
    limit: float
    checkpoint: TrainingCheckpoint | None
    on_step: Callable[[int], object] | None
    stream: Stream
    measured: Measured
    place: _Place

    def epoch(self, batches: Iterator[Batch]) -> Iterator[Record]:
        """The rest of the running epoch, or as much as the time allows."""
        state = self.place.schedule
        rest = islice(batches, self.place.batches, None)
        for group, is_last in grouped(rest, state.ratio):
            self.advance([(x.to(self.device), y.to(self.device)) for x, y in group])
            if is_last:
                yield self.after_epoch()
            elif self.is_over():
                yield self.recorded()
                return
            elif self.every and self.place.step % self.every == 0:
                yield self.recorded()
            elif self.checkpoint and self.place.step % self.checkpoint.every == 0:
                self.keep()

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def is_over(self) -> bool:
        return self.place.cost.seconds >= self.limit

    def advance(self, batches: Sequence[Batch]) -> None:
        """One step."""
        place, state = self.place, self.place.schedule
        cost = place.cost
        with self.stream.here():
            if state.adversarial_share:
                batches, spent = self.attacked(batches)
                cost += spent
            step, spent = self.measured.step(batches, state.ratio)
        self.place = replace(
            place,
            batches=place.batches + len(batches),
            examples=place.examples + sum(len(targets) for _, targets in batches),
            step=place.step + 1,
            loss_sum=place.loss_sum + step.loss,
            loss_count=place.loss_count + 1,
            cost=cost + spent,
        )
        if self.on_step is not None:
            self.on_step(self.place.examples)

    def attacked(self, batches: Sequence[Batch]) -> tuple[list[Batch], Cost]:
        assert self.attack is not None
        found, cost = [], Cost()
        for batch in batches:
            share = self.place.schedule.adversarial_share
            moved, spent = self.measured.attacked(self.attack, batch, share)
            found.append(moved)
            cost += spent
        return found, cost

    def after_epoch(self) -> Record:
        """The record of the epoch that has ended; the next one begins."""
        place = self.place
        eigenvalue = self.watched() if self.track or place.schedule.watching else None
        new = self.schedule.after_epoch(place.schedule, eigenvalue)
        record = self.record(eigenvalue)
        for group in self.steps.optimizer.param_groups:
            group["lr"] *= new.lr_factor / place.schedule.lr_factor
        self.place = replace(self.place, schedule=new, batches=0, examples=0)
        return self.kept(record)

    def watched(self) -> float:
        """The eigenvalue; what it costs counts where the schedule needs it."""
        place, watch = self.place, self.watch
        assert watch is not None
        with self.aside():
            found, cost = self.measured.counted(lambda: watch(place.vectors))
        cost = replace(cost, matvecs=found.matvecs) if place.schedule.watching else Cost()
        self.place = replace(place, vectors=found.vectors, cost=place.cost + cost)
        return float(found.values[0])

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is drawn inside is a function of the seed, and later batches and draws stay."""
        with undisturbed(self.model, self.source), replace(self.stream).here():
            yield

    def recorded(self) -> Record:
        return self.kept(self.record())

    def record(self, eigenvalue: float | None = None) -> Record:
        place, criterion = self.place, self.steps.criterion
        with self.aside():
            seen = evaluated(self.model, self.source, criterion)
            test = None if self.test is None else evaluated(self.model, self.test, criterion)
        if not math.isfinite(seen.loss):
            raise FloatingPointError(
                f"the loss is {seen.loss} after {place.step} steps: {DIVERGED}"
            )
        return Record(
            step=place.step,
            epoch=place.schedule.epoch + place.examples / seen.examples,
            loss=seen.loss,
            minibatch_loss=place.loss_sum / place.loss_count if place.loss_count else None,
            accuracy=seen.accuracy,
            test_loss=None if test is None else test.loss,
            test_accuracy=None if test is None else test.accuracy,
            ratio=place.schedule.ratio,
            adversarial_share=place.schedule.adversarial_share,
            lr=self.steps.optimizer.param_groups[0]["lr"],
            eigenvalue=eigenvalue,
            **vars(place.cost),
        )

    def kept(self, record: Record) -> Record:
        """The same record, which belongs to the state from now on."""
        records = (*self.place.records, record)
        self.place = replace(self.place, records=records, loss_sum=0.0, loss_count=0)
        self.keep()
        return record

    def keep(self) -> None:
        """Write the state, where it is wanted."""
        if self.checkpoint is None:
            return
        place = {**vars(self.place), "schedule": vars(self.place.schedule)}
        place |= {"cost": vars(self.place.cost), "records": [vars(r) for r in self.place.records]}
        state = {
            "state_dict": self.model.state_dict(),
            "steps": self.steps.state(),
            "stream": self.stream.states,
            "unit": self.measured.unit,
            "place": place,
        }
        self.checkpoint.write(state, finished=self.place.schedule.epoch >= self.epochs)

    def go_on(self) -> None:
        """Take up the state that was written."""
        state = None if self.checkpoint is None else self.checkpoint.read()
        if state is None:
            return
        place = state["place"]
        self.model.load_state_dict(state["state_dict"])
        self.steps.restore(state["steps"])
        self.stream.states = state["stream"]
        self.place = _Place(
            **{
                **place,
                "schedule": ScheduleState(**place["schedule"]),
                "cost": Cost(**place["cost"]),
                "records": tuple(Record(**record) for record in place["records"]),
                "vectors": tree_map(lambda leaf: leaf.to(self.device), place["vectors"]),
            }
        )
        self.measured.peak = self.place.cost.peak_bytes
        self.measured.unit = state.get("unit", 0)
