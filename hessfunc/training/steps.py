"""Steps of an optimiser, each with the gradients of one or more batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.numerics import NonFiniteError
from hessfunc.training.flops import Metered

Batch: TypeAlias = tuple[Tensor, Tensor]
Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]

DIVERGED = "lower the learning rate, or increase alpha if the method has one"


@dataclass(frozen=True)
class Spent:
    """Cost of an update of the parameters, without the cost of the gradient.

    Attributes:
        matvecs: Number of products.
        flops: Number of floating-point operations.
    """

    matvecs: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Step(Spent):
    """Cost and loss of one step.

    Attributes:
        loss: Mean loss over the examples of the step, before the update.
    """

    loss: float = 0.0


@dataclass(frozen=True)
class Steps:
    """Steps of the parameters of a model.

    Attributes:
        model: Module whose gradients are computed.
        optimizer: Optimiser whose learning rate a schedule may change and whose state is kept.
        move: Function that updates the parameters, given the batches of a step. The gradients are
            in ``p.grad`` when it is called.
        criterion: Function ``(outputs, targets) -> mean over the examples``.
        meter: Meter that counts the operations of ``move``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    move: Callable[[Sequence[Batch]], Spent]
    criterion: Criterion = F.cross_entropy
    meter: Metered | None = None

    def __call__(self, batches: Sequence[Batch], ratio: int = 1, /) -> Step:
        """Make one step with the gradients of at most ``ratio`` batches, one after another.

        The gradient is that of

            sum_i n_i loss_i / sum_i n_i  *  len(batches) / ratio

        where batch i has n_i examples. With the second factor, a learning rate in proportion to the
        ratio also suits fewer batches. The graph of each batch is freed before the next one.

        Raises:
            FloatingPointError: If the loss of a batch is not finite.
            ValueError: If a batch has one example and the model normalises by batch statistics.
        """
        self.optimizer.zero_grad()
        total, count = 0.0, sum(len(targets) for _, targets in batches)
        for inputs, targets in batches:
            with single_examples_explained(targets):
                loss = self.criterion(self.model(inputs), targets)
            if not loss.isfinite():
                raise NonFiniteError(f"the loss of a batch is {loss.item()}: {DIVERGED}")
            # The divisor is exactly `ratio` if all batches have one size, so that with ratio 1 the
            # gradient of a batch keeps its bits.
            (loss / (ratio * (count / (len(batches) * len(targets))))).backward()
            total += loss.item() * (len(targets) / count)
        spent = self.move(batches)
        return Step(loss=total, matvecs=spent.matvecs, flops=spent.flops)

    def state(self) -> dict[str, Any]:
        """Return the state on which later steps depend, apart from the model."""
        meter = None if self.meter is None else (self.meter.total, self.meter.by_kind)
        return {"optimizer": self.optimizer.state_dict(), "meter": meter}

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Restore the state of an earlier `state` call."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.meter is not None:
            self.meter.total, self.meter.by_kind = state["meter"]


@contextmanager
def single_examples_explained(targets: Tensor, /) -> Iterator[None]:
    """Context that explains the error of batch normalisation for a batch with one example.

    Raises:
        ValueError: If there is one target and normalisation in train mode refuses its example.
    """
    try:
        yield
    except ValueError as error:
        if len(targets) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "a batch has a single example, from which batch normalisation cannot compute "
            "statistics: choose a batch size that leaves more for the last batch of an epoch, or "
            "pass a DataLoader with `drop_last=True`"
        ) from error


def first_order(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Criterion = F.cross_entropy, /
) -> Steps:
    """Return the steps of any PyTorch optimiser that needs only gradients."""

    def move(batches: Sequence[Batch]) -> Spent:
        optimizer.step()
        return Spent()

    return Steps(model, optimizer, move, criterion)
