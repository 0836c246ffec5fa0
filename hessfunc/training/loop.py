"""A plain training loop that tells what it has cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.memory import PeakMemory
from hessfunc.problems.data import Examples
from hessfunc.training.work import CountedFlops

__all__ = ["DIVERGED", "Batch", "Record", "Step", "StepFunction", "train"]

Batch: TypeAlias = tuple[Tensor, Tensor]

DIVERGED = "lower the learning rate, or raise alpha where there is one"

_EVALUATED_AT_ONCE = 500


@dataclass(frozen=True)
class Step:
    """What one step of an optimiser tells.

    Attributes:
        loss: of the batch, before the step.
        matvecs: products that were spent.
        flops: floating-point operations beyond those of the gradient.
    """

    loss: float
    matvecs: int = 0
    flops: int = 0


# Takes a batch, computes its gradient, and moves the model's parameters.
StepFunction: TypeAlias = Callable[[Batch], Step]


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where a training stands.

    Attributes:
        step: steps so far.
        epoch: passes over the training examples so far.
        loss: mean over all training examples.
        minibatch_loss: mean over the batches since the last record, each before its step; None
            before the first.
        accuracy: on the training examples.
        test_loss: mean over the test examples; None where there are none.
        test_accuracy: on the test examples; None where there are none.
        matvecs: products so far.
        gradients: the work so far in gradient-equivalents: the floating-point operations of
            products, convolutions and decompositions of matrices, over those of one gradient of
            the same batch. A step of SGD is one.
        seconds: of the steps so far, without the evaluations.
        peak_bytes: memory that tensors made during a step have held at most: on the CPU during
            the first, on CUDA during any.
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


def train(
    model: nn.Module,
    step: StepFunction,
    examples: Examples,
    /,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    test: Examples | None = None,
    every: int | None = None,
    minutes: float | None = None,
) -> Iterator[Record]:
    """Train a classifier, and yield a `Record` at the start, after each epoch, and at the end.

    The order of the examples is a function of the seed; torch's random stream stays as it was.

    Args:
        model: in the mode in which it is to be trained and evaluated.
        step: changes the model's parameters; raises where the loss is not finite.
        examples: to train on.
        epochs: passes over them.
        batch_size: examples a step; the last batch of an epoch may be smaller.
        seed: of the order.
        test: examples to evaluate on, beside.
        every: also a record after so many steps.
        minutes: end after so much time of steps.

    Raises:
        ValueError: there is no example, or an option is out of range.
        FloatingPointError: the loss over all examples is not finite.
    """
    if epochs < 0 or batch_size < 1 or not len(examples):
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}, {len(examples)} examples: epochs must not "
            "be negative, the others at least 1"
        )
    limit = math.inf if minutes is None else 60 * minutes
    order = torch.Generator().manual_seed(seed)
    measured = _measured(model, step)
    cost, losses, steps, seen = _Cost(), list[float](), 0, 0

    def record() -> Record:
        value, accuracy = _evaluated(model, examples)
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} after {steps} steps: {DIVERGED}")
        tested = (None, None) if test is None else _evaluated(model, test)
        return Record(
            step=steps,
            epoch=seen / len(examples),
            loss=value,
            minibatch_loss=sum(losses) / len(losses) if losses else None,
            accuracy=accuracy,
            test_loss=tested[0],
            test_accuracy=tested[1],
            **vars(cost),
        )

    yield record()
    for _ in range(epochs):
        for index in torch.randperm(len(examples), generator=order).split(batch_size):
            loss, spent = measured((examples.inputs[index], examples.targets[index]))
            cost, steps, seen = cost + spent, steps + 1, seen + len(index)
            losses.append(loss)
            is_over = cost.seconds >= limit
            if is_over or seen % len(examples) == 0 or (every and steps % every == 0):
                yield record()
                losses.clear()
            if is_over:
                return


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What steps have cost, as in `Record`."""

    matvecs: int = 0
    gradients: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(
            matvecs=self.matvecs + other.matvecs,
            gradients=self.gradients + other.gradients,
            seconds=self.seconds + other.seconds,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )


def _measured(model: nn.Module, step: StepFunction) -> Callable[[Batch], tuple[float, _Cost]]:
    """A step that gives the loss before it, and its cost."""
    device = next(model.parameters()).device
    of_gradient: dict[torch.Size, int] = {}
    peak_of_step = _peak_on_cuda(device) if device.type == "cuda" else _peak_of_the_first()

    def measured(batch: Batch) -> tuple[float, _Cost]:
        shape = batch[0].shape
        if shape not in of_gradient:
            of_gradient[shape] = _flops_of_gradient(model, batch)
        start = time.perf_counter()
        found, peak = peak_of_step(lambda: step(batch))
        seconds = time.perf_counter() - start
        gradients = 1 + found.flops / of_gradient[shape]
        cost = _Cost(matvecs=found.matvecs, gradients=gradients, seconds=seconds, peak_bytes=peak)
        return found.loss, cost

    return measured


def _peak_of_the_first() -> Callable[[Callable[[], Step]], tuple[Step, int]]:
    """Runs a step, and gives the peak memory of the first one: to watch it takes time."""
    peaks: list[int] = []

    def run(step: Callable[[], Step]) -> tuple[Step, int]:
        if peaks:
            return step(), peaks[0]
        with PeakMemory() as memory:
            found = step()
        peaks.append(memory.peak)
        return found, memory.peak

    return run


def _peak_on_cuda(device: torch.device) -> Callable[[Callable[[], Step]], tuple[Step, int]]:
    def run(step: Callable[[], Step]) -> tuple[Step, int]:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        found = step()
        torch.cuda.synchronize(device)
        return found, torch.cuda.max_memory_allocated(device) - before

    return run


def _flops_of_gradient(model: nn.Module, batch: Batch) -> int:
    inputs, targets = batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    with CountedFlops() as flops:
        torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)
    return flops.total


def _evaluated(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """The mean loss and the accuracy."""
    total, hits = 0.0, 0
    with torch.no_grad():
        for inputs, targets in examples.batches(_EVALUATED_AT_ONCE):
            outputs = model(inputs)
            total += float(F.cross_entropy(outputs, targets, reduction="sum"))
            hits += int((outputs.argmax(-1) == targets).sum())
    return total / len(examples), hits / len(examples)
