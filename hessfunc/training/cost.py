"""What the steps of a training cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.func import functional_call

from hessfunc.memory import Footprint
from hessfunc.optim.adversarial import Attack, partly
from hessfunc.training.flops import CountedFlops
from hessfunc.training.steps import Batch, Step, Steps, single_examples_explained
from hessfunc.training.stream import Stream

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What steps have cost, as in `hessfunc.training.loop.Record`."""

    matvecs: int = 0
    gradients: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            matvecs=self.matvecs + other.matvecs,
            gradients=self.gradients + other.gradients,
            seconds=self.seconds + other.seconds,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )


@dataclass
class Measured:
    """Steps that tell their cost.

    Attributes:
        steps: what is measured.
        peak: memory of the first step on the CPU, once it is known: to watch it takes time.
        unit: the floating-point operations of the gradient of a base batch, once they are known.
        of_attack: the gradients that an attack on a share of a batch of each shape is worth.
    """

    steps: Steps
    peak: int = 0
    unit: int = 0
    of_attack: dict[tuple[torch.Size, float], float] = field(default_factory=dict)

    def step(self, batches: Sequence[Batch], ratio: int) -> tuple[Step, Cost]:
        """One step, and its cost."""
        self.measure_unit(batches[0])
        start = time.perf_counter()
        found, peak = self._with_peak(lambda: self.steps(batches, ratio))
        return found, Cost(
            matvecs=found.matvecs,
            gradients=len(batches) + found.flops / self.unit,
            seconds=time.perf_counter() - start,
            peak_bytes=peak,
        )

    def attacked(self, attack: Attack, batch: Batch, share: float, /) -> tuple[Batch, Cost]:
        """A batch of which a share is adversarial; work is counted the first time of its kind."""
        kind = batch[0].shape, share
        if kind not in self.of_attack:
            self.measure_unit(batch)
            found, cost = self.counted(lambda: partly(attack, batch, share))
            self.of_attack[kind] = cost.gradients
            return found, cost
        start = time.perf_counter()
        found = partly(attack, batch, share)
        seconds = time.perf_counter() - start
        return found, Cost(gradients=self.of_attack[kind], seconds=seconds)

    def counted(self, run: Callable[[], Found], /) -> tuple[Found, Cost]:
        """Any work after the first batch, in units of the gradient of a base batch."""
        start = time.perf_counter()
        with CountedFlops() as flops:
            found = run()
        return found, Cost(gradients=flops.total / self.unit, seconds=time.perf_counter() - start)

    def measure_unit(self, batch: Batch) -> None:
        """Take the unit from a batch, the first one: later ones may be smaller."""
        if self.unit:
            return
        inputs, targets = batch
        model, device = self.steps.model, next(self.steps.model.parameters()).device
        trainable = [p for p in model.parameters() if p.requires_grad]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # Neither the statistics of normalisation nor the training's random numbers move.
        with (
            CountedFlops() as flops,
            Stream.of(0, device).here(),
            single_examples_explained(targets),
        ):
            outputs = functional_call(model, buffers, (inputs,))
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
            found = run()
        self.peak = memory.peak
        return found, memory.peak


def _on_cuda(run: Callable[[], Step], device: torch.device) -> tuple[Step, int]:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = run()
    torch.cuda.synchronize(device)
    return found, torch.cuda.max_memory_allocated(device) - before
