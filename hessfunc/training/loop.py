"""Training loop that records its cost and can be resumed after an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import nn

from hessfunc.numerics import NonFiniteError
from hessfunc.optim.adversarial import Attack
from hessfunc.optim.schedules import Schedule, ScheduleState, constant
from hessfunc.tracking.undisturbed import refuse_busy_workers, undisturbed
from hessfunc.training.batches import Source, epochs_of, grouped, refuse_iterators
from hessfunc.training.checkpoint import TrainingCheckpoint
from hessfunc.training.cost import Measured, StepCost
from hessfunc.training.dominant import Watch
from hessfunc.training.evaluation import evaluated
from hessfunc.training.examples import Examples
from hessfunc.training.steps import DIVERGED, Batch, Steps
from hessfunc.training.stream import Stream
from hessfunc.trees import Tree, tree_map


@dataclass(frozen=True, kw_only=True)
class Record:
    """State of a training at one point.

    Attributes:
        step: Number of steps so far.
        epoch: Number of passes over the training examples so far.
        loss: Mean loss over all training examples.
        minibatch_loss: Mean over the steps since the last record of the loss before each step;
            None before the first step.
        accuracy: Accuracy on the training examples.
        test_loss: Mean loss over the test examples; None without test examples.
        test_accuracy: Accuracy on the test examples; None without test examples.
        matvecs: Number of products so far.
        gradients: Work so far in gradient-equivalents: the floating-point operations of matrix
            products, convolutions and decompositions, divided by those of one gradient of the
            first base batch. A step of SGD counts one for each of its base batches.
        seconds: Duration of the steps so far, without the evaluations, in seconds.
        peak_bytes: Peak memory of the tensors allocated during a step, in bytes: of the first step
            on a CPU, of any step so far on CUDA.
        ratio: Number of base batches in a step of this epoch.
        adversarial_share: Fraction of each base batch that was adversarial.
        lr: Learning rate of this epoch.
        eigenvalue: Dominant eigenvalue after the epoch; None if it was not measured.
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

    The schedule determines the number of base batches in one step. No step crosses an epoch. The
    order and all draws are functions of the seed, also those of a loader without its own generator.
    Torch's random stream does not change. Evaluations are made in eval mode.

    Args:
        model: Module to train, in the mode in which it is to be trained.
        steps: Steps of its parameters.
        source: Examples to train on, or a loader or list of batches ``(inputs, targets)``, which
            is read again in each epoch and for each record.
        epochs: Number of passes over the examples.
        batch_size: Number of examples in a base batch; the last batch of an epoch may be smaller.
            A loader uses its own batch size.
        seed: Seed of the order and of the draws of layers.
        test: Examples for an additional evaluation.
        schedule: Schedule of the batch size and the learning rate. By default one batch makes one
            step.
        attack: Function that makes the adversarial examples of the schedule.
        watch: Function that measures the eigenvalue for the schedule, as made by
            `hessfunc.training.dominant.watch`.
        track: Whether the eigenvalue is measured after each epoch, even if the schedule does not
            need it.
        every: Number of steps between additional records within an epoch.
        minutes: Time limit for the steps, in minutes.
        checkpoint: Checkpoint that keeps the state. A training with the same settings is resumed
            from it, yields the earlier records again, and ends with the same bits.
        on_step: Function called after each step with the number of examples so far in the epoch.

    Yields:
        Records of the training.

    Raises:
        ValueError: If there is no example; if an option is out of range or missing; if a source is
            an iterator; or if a loader with persistent workers is read for records within an epoch.
        FloatingPointError: If the loss over all examples is not finite.
    """
    if epochs < 0 or batch_size < 1 or (isinstance(source, Examples) and not len(source)):
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}: epochs must not be negative, batch_size "
            "must be at least 1, and the source must have at least one example"
        )
    refuse_iterators(source, test)
    if every:
        refuse_busy_workers(source)
    if checkpoint is not None and not isinstance(source, Examples):
        raise ValueError(
            "a training on a loader cannot be resumed, because its order is unknown: with a "
            "checkpoint, train on Examples"
        )
    schedule = schedule or constant()
    first = schedule.init()
    if (first.watching or track) and watch is None:
        raise ValueError(
            "the schedule or `track` needs eigenvalues: pass "
            "`watch=hessfunc.training.dominant.watch(model, batches)`"
        )
    if first.adversarial_share and attack is None:
        raise ValueError(
            "the schedule needs adversarial examples: pass "
            "`attack=functools.partial(fgsm, loss, params)`"
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
    """Position of a training, with all state apart from the model, the steps and the draws.

    Attributes:
        schedule: State of the schedule for the current epoch.
        batches: Number of base batches of the current epoch so far.
        examples: Number of examples in these batches.
        step: Number of steps so far.
        loss_sum: Sum of the losses of the steps since the last record.
        loss_count: Number of steps since the last record.
        cost: Cost so far.
        vectors: Eigenvectors of the last measured eigenvalue.
        records: Records so far.
    """

    schedule: ScheduleState
    batches: int = 0
    examples: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    cost: StepCost = field(default_factory=StepCost)
    vectors: Tree | None = None
    records: tuple[Record, ...] = ()


@dataclass(kw_only=True)
class _Training:
    """Training in progress, with its options and its current position."""

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
        """Train for the rest of the current epoch, or until the time limit."""
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
        """Make one step, and update the position."""
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

    def attacked(self, batches: Sequence[Batch]) -> tuple[list[Batch], StepCost]:
        assert self.attack is not None
        attacked, cost = [], StepCost()
        for batch in batches:
            share = self.place.schedule.adversarial_share
            moved, spent = self.measured.attacked(self.attack, batch, share)
            attacked.append(moved)
            cost += spent
        return attacked, cost

    def after_epoch(self) -> Record:
        """Return the record of the finished epoch, and begin the next epoch."""
        place = self.place
        eigenvalue = self.watched() if self.track or place.schedule.watching else None
        new = self.schedule.after_epoch(place.schedule, eigenvalue)
        record = self.record(eigenvalue)
        for group in self.steps.optimizer.param_groups:
            group["lr"] *= new.lr_factor / place.schedule.lr_factor
        self.place = replace(self.place, schedule=new, batches=0, examples=0)
        return self.kept(record)

    def watched(self) -> float:
        """Measure the eigenvalue; its cost counts only if the schedule needs it."""
        place, watch = self.place, self.watch
        assert watch is not None
        with self.aside():
            pairs, cost = self.measured.counted(lambda: watch(place.vectors))
        cost = replace(cost, matvecs=pairs.matvecs) if place.schedule.watching else StepCost()
        self.place = replace(place, vectors=pairs.vectors, cost=place.cost + cost)
        return float(pairs.values[0])

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context whose draws depend on the seed only and do not affect later batches or draws."""
        with undisturbed(self.model, self.source), replace(self.stream).here():
            yield

    def recorded(self) -> Record:
        return self.kept(self.record())

    def record(self, eigenvalue: float | None = None) -> Record:
        place, criterion = self.place, self.steps.criterion
        with self.aside():
            training = evaluated(self.model, self.source, criterion)
            test = None if self.test is None else evaluated(self.model, self.test, criterion)
        if not math.isfinite(training.loss):
            raise NonFiniteError(
                f"the loss is {training.loss} after {place.step} steps: {DIVERGED}"
            )
        return Record(
            step=place.step,
            epoch=place.schedule.epoch + place.examples / training.examples,
            loss=training.loss,
            minibatch_loss=place.loss_sum / place.loss_count if place.loss_count else None,
            accuracy=training.accuracy,
            test_loss=None if test is None else test.loss,
            test_accuracy=None if test is None else test.accuracy,
            ratio=place.schedule.ratio,
            adversarial_share=place.schedule.adversarial_share,
            lr=self.steps.optimizer.param_groups[0]["lr"],
            eigenvalue=eigenvalue,
            **vars(place.cost),
        )

    def kept(self, record: Record) -> Record:
        """Add a record to the state, keep the state, and return the record."""
        records = (*self.place.records, record)
        self.place = replace(self.place, records=records, loss_sum=0.0, loss_count=0)
        self.keep()
        return record

    def keep(self) -> None:
        """Write the state to the checkpoint, if there is one."""
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
        """Resume from the state in the checkpoint, if there is one."""
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
                "cost": StepCost(**place["cost"]),
                "records": tuple(Record(**record) for record in place["records"]),
                "vectors": tree_map(lambda leaf: leaf.to(self.device), place["vectors"]),
            }
        )
        self.measured.peak = self.place.cost.peak_bytes
        self.measured.unit = state.get("unit", 0)
