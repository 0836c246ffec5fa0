"""Measure the cost of the steps of a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from hessfunc.autograd.stateless import call_with
from hessfunc.memory import Footprint
from hessfunc.optim.adversarial import Attack, partly
from hessfunc.training.flops import CountedFlops
from hessfunc.training.steps import Batch, Step, Steps, single_examples_explained
from hessfunc.training.stream import Stream

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of steps, in the units of `hessfunc.training.loop.Record`."""

    matvecs: int = 0
    gradients: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(
            matvecs=self.matvecs + other.matvecs,
            gradients=self.gradients + other.gradients,
            seconds=self.seconds + other.seconds,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )


@dataclass
class Measured:
    """Steps whose cost is measured.

    Attributes:
        steps: Steps that are measured.
        peak: Peak memory of the first step on the CPU, in bytes; 0 until it is measured. Later
            steps are not measured, because this takes time.
        unit: Floating-point operations of the gradient of a base batch; 0 until they are counted.
        of_attack: Cost of an attack in gradient-equivalents, by the shape of the inputs and the
            adversarial share.
    """

    steps: Steps
    peak: int = 0
    unit: int = 0
    of_attack: dict[tuple[torch.Size, float], float] = field(default_factory=dict)

    def step(self, batches: Sequence[Batch], ratio: int) -> tuple[Step, StepCost]:
        """Make one step, and return it with its cost."""
        self.measure_unit(batches[0])
        start = time.perf_counter()
        step, peak = self._with_peak(lambda: self.steps(batches, ratio))
        return step, StepCost(
            matvecs=step.matvecs,
            gradients=len(batches) + step.flops / self.unit,
            seconds=time.perf_counter() - start,
            peak_bytes=peak,
        )

    def attacked(self, attack: Attack, batch: Batch, share: float, /) -> tuple[Batch, StepCost]:
        """Return a batch with an adversarial share, and its cost.

        Operations are counted once for each shape and share.
        """
        kind = batch[0].shape, share
        if kind not in self.of_attack:
            self.measure_unit(batch)
            moved, cost = self.counted(lambda: partly(attack, batch, share))
            self.of_attack[kind] = cost.gradients
            return moved, cost
        start = time.perf_counter()
        moved = partly(attack, batch, share)
        seconds = time.perf_counter() - start
        return moved, StepCost(gradients=self.of_attack[kind], seconds=seconds)

    def counted(self, run: Callable[[], Found], /) -> tuple[Found, StepCost]:
        """Run a function after the first batch, and return its result and its cost."""
        start = time.perf_counter()
        with CountedFlops() as flops:
            result = run()
        return result, StepCost(
            gradients=flops.total / self.unit, seconds=time.perf_counter() - start
        )

    def measure_unit(self, batch: Batch) -> None:
        """Count the operations of one gradient of the first batch, as later ones may be smaller."""
        if self.unit:
            return
        inputs, targets = batch
        model, device = self.steps.model, next(self.steps.model.parameters()).device
        trainable = [p for p in model.parameters() if p.requires_grad]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # Copied buffers and a separate stream leave the batch statistics and the random numbers
        # of the training unchanged.
        with (
            CountedFlops() as flops,
            Stream.of(0, device).here(),
            single_examples_explained(targets),
        ):
            outputs = call_with(model, buffers, (inputs,))
            loss = self.steps.criterion(outputs, targets)
            torch.autograd.grad(loss, trainable, allow_unused=True)
        self.unit = flops.total

    def _with_peak(self, run: Callable[[], Step]) -> tuple[Step, int]:
        device = next(self.steps.model.parameters()).device
        if device.type == "cuda":
            return _on_cuda(run, device)
        if self.peak:
            return run(), self.peak
        with Footprint() as memory:
            step = run()
        self.peak = memory.peak
        return step, memory.peak


def _on_cuda(run: Callable[[], Step], device: torch.device) -> tuple[Step, int]:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = run()
    torch.cuda.synchronize(device)
    return step, torch.cuda.max_memory_allocated(device) - before
