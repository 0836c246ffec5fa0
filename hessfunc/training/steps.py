"""Steps of an optimiser, each with the gradient of one or more batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.training.flops import Metered

Batch: TypeAlias = tuple[Tensor, Tensor]
Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]

DIVERGED = "lower the learning rate, or raise alpha where there is one"


@dataclass(frozen=True)
class Spent:
    """What moving the parameters has taken, beyond their gradient.

    Attributes:
        matvecs: products.
        flops: floating-point operations.
    """

    matvecs: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Step(Spent):
    """What one step tells.

    Attributes:
        loss: mean over its examples, before the step.
    """

    loss: float = 0.0


@dataclass(frozen=True)
class Steps:
    """How the parameters of a model move.

    Attributes:
        model: whose gradients are found.
        optimizer: whose learning rate a schedule may change, and whose state is kept.
        move: takes the batches of a step, whose gradient is in the parameters, and moves these.
        criterion: ``(outputs, targets) -> mean over the examples``.
        meter: what counts the operations of ``move``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    move: Callable[[Sequence[Batch]], Spent]
    criterion: Criterion = F.cross_entropy
    meter: Metered | None = None

    def __call__(self, batches: Sequence[Batch], ratio: int = 1, /) -> Step:
        """One step with the gradients of at most ``ratio`` batches, one after another.

        Each batch counts by its examples, and all together as their number over ``ratio``:

            sum_i n_i loss_i / sum_i n_i  *  len(batches) / ratio

        so that a learning rate in proportion to the ratio suits fewer batches, too. Graphs are
        freed batch by batch.

        Raises:
            FloatingPointError: the loss of a batch is not finite.
            ValueError: a batch has one example, and the model normalises by its statistics.
        """
        self.optimizer.zero_grad()
        total, count = 0.0, sum(len(targets) for _, targets in batches)
        for inputs, targets in batches:
            with single_examples_explained(targets):
                loss = self.criterion(self.model(inputs), targets)
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of a batch is {loss.item()}: {DIVERGED}")
            # Exactly the ratio where all batches are of one size, and one gradient is untouched.
            (loss / (ratio * (count / (len(batches) * len(targets))))).backward()
            total += loss.item() * (len(targets) / count)
        spent = self.move(batches)
        return Step(loss=total, matvecs=spent.matvecs, flops=spent.flops)

    def state(self) -> dict[str, Any]:
        """What a later step depends on, besides the model."""
        meter = None if self.meter is None else (self.meter.total, self.meter.found)
        return {"optimizer": self.optimizer.state_dict(), "meter": meter}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Go on from a state."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.meter is not None:
            self.meter.total, self.meter.found = state["meter"]


@contextmanager
def single_examples_explained(targets: Tensor, /) -> Iterator[None]:
    """Inside, what batch normalisation refuses is said with what to do about it.

    Raises:
        ValueError: there is one target, and normalisation in train mode has refused its example.
    """
    try:
        yield
    except ValueError as error:
        if len(targets) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "a batch has a single example, which has no statistics to normalise by: choose a batch "
            "size that leaves more for the last batch of an epoch, or drop that one in a loader of "
            "your own"
        ) from error


def first_order(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Criterion = F.cross_entropy, /
) -> Steps:
    """The steps of any optimiser of torch that needs nothing but gradients."""

    def move(batches: Sequence[Batch]) -> Spent:
        optimizer.step()
        return Spent()

    return Steps(model, optimizer, move, criterion)
