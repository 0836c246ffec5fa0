"""Curvature that is watched from any training loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc import modules as modes
from hessfunc.losses import LossFunction, supervised
from hessfunc.modules import functional
from hessfunc.options import at_least, validated
from hessfunc.tracking.measure import Point, Tracking, TrackingState, functional_tracker
from hessfunc.tracking.stability import adam_diagonal, edges
from hessfunc.tracking.undisturbed import refuse_busy_workers, undisturbed
from hessfunc.tracking.writers import ScalarWriter, json_lines, summary_writer, writing


class Tracker:
    """Measures a model every few steps of its training; `tracked` makes one.

    Attributes:
        points: those that were measured, in order.
        steps: of the optimiser so far.
        state: the last eigenpairs with their vectors, from which the next point starts.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Tracking,
        batches: Iterable[Any],
        /,
        *,
        every: int | None,
        optimizer: torch.optim.Optimizer | None,
        preconditioned: bool,
        writers: Iterable[Callable[[Point], object]],
        steps: int,
    ) -> None:
        self.points: list[Point] = []
        self.steps = steps
        self._model, self._method, self._batches = model, method, batches
        self._every, self._optimizer, self._writers = every, optimizer, tuple(writers)
        self._preconditioned = preconditioned
        # Parameters that are frozen later still belong to the matrix.
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.state: TrackingState = method.init(self._params())

    def step(
        self, steps: int | None = None, /, *, lr: float | None = None, epoch: float | None = None
    ) -> Point | None:
        """Tell that the optimiser has made a step, and measure where it is time.

        It is time at each multiple of ``every``, or at the first step that is told after one.

        Args:
            steps: those made so far; by default one more than at the last call.
            lr: the learning rate of the next step; by default that of the optimiser.
            epoch: passes over the data so far.

        Returns:
            The point, or None between two points.
        """
        before, self.steps = self.steps, self.steps + 1 if steps is None else steps
        if self._every is None or self.steps // self._every <= before // self._every:
            return None
        return self.measure(lr=lr, epoch=epoch)

    def measure(self, *, lr: float | None = None, epoch: float | None = None) -> Point:
        """Measure now, whatever the step: at the end of an epoch, say.

        Raises:
            FloatingPointError: the loss is finite, and a product is not.
        """
        started = time.perf_counter()
        with undisturbed(self._model, self._batches):
            self.state, found = self._method.measure(
                self.state, self._params(), self._batches, self._preconditioner()
            )
        edge, preconditioned_edge = edges(self._optimizer, lr)
        point = Point(
            **vars(found),
            step=self.steps,
            epoch=epoch,
            lr=self._lr() if lr is None else lr,
            edge=edge,
            preconditioned_edge=preconditioned_edge,
            seconds=time.perf_counter() - started,
        )
        self.points.append(point)
        for write in self._writers:
            write(point)
        return point

    def _params(self) -> dict[str, Tensor]:
        found = dict(self._model.named_parameters())
        return {name: found[name].detach() for name in self._names}

    def _lr(self) -> float | None:
        return None if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"])

    def _preconditioner(self) -> dict[str, Tensor] | None:
        # Before its first step an Adam has no second moments.
        if not self._preconditioned or self._optimizer is None or not self._optimizer.state:
            return None
        return adam_diagonal(self._optimizer, self._model)


@validated
@contextmanager
def tracked(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    /,
    *,
    every: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    preconditioned: bool = False,
    compose: Callable[..., LossFunction] = supervised,
    eval_mode: bool = True,
    out: str | os.PathLike[str] | None = None,
    tensorboard: str | os.PathLike[str] | ScalarWriter | None = None,
    callback: Callable[[Point], object] | None = None,
    steps: int = 0,
    **options: Any,
) -> Iterator[Tracker]:
    """Watch the curvature of a model while it trains, in any loop.

        with tracked(model, criterion, [batch], every=10, optimizer=optimizer) as tracker:
            for inputs, targets in loader:
                ...
                optimizer.step()
                tracker.step()

    The training is not changed by a single bit: parameters, buffers, gradients and training flags
    stay as they are, and so do the random streams of Python, NumPy, torch and the loader.

    Args:
        model: that is trained.
        criterion: ``(outputs, targets) -> scalar``.
        batches: on which the curvature is measured, a list or a loader: the same at each point,
            or the curve is one of the batches, too.
        every: measure after so many steps; None for only where ``measure`` is called.
        optimizer: Optimiser whose learning rate is recorded, with the curvature at which its steps
            are stable.
        preconditioned: measure the sharpness that the optimiser feels, an Adam, from its first
            step on.
        compose: makes the loss of the pure model function and the criterion: `supervised`, or
            `composed` for a criterion ``(outputs, batch) -> scalar``.
        eval_mode: measure in eval mode, whatever the mode of the training; else in the mode in
            which the model is now.
        out: a file to which each point is appended, one line of JSON each; it survives a kill.
        tensorboard: a folder for TensorBoard, or a writer with ``add_scalar`` and ``flush``.
        callback: called with each point.
        steps: those that were made before, where a training goes on.
        options: of `tracking`: what is measured, and how well.

    Returns:
        A context manager that gives a `Tracker`.

    Raises:
        ValueError: an option is out of range; the loader keeps its workers between passes.
        TypeError: ``preconditioned``, and the optimiser is no Adam.
        ModuleNotFoundError: tensorboard is not installed.

    Cost: that of `tracking` at each point.
    """
    at_least(1, every=every)
    refuse_busy_workers(batches)
    if preconditioned and not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(
            f"preconditioned=True needs the optimizer, an Adam, and got {type(optimizer).__name__}"
        )
    with modes.eval_mode(model) if eval_mode else nullcontext():
        loss = compose(functional(model)[0], criterion)
    with ExitStack() as stack:
        writers: list[Callable[[Point], object]] = []
        if out is not None:
            writers.append(json_lines(out))
        if isinstance(tensorboard, (str, os.PathLike)):
            writers.append(writing(stack.enter_context(closing(summary_writer(tensorboard)))))
        elif tensorboard is not None:
            writers.append(writing(tensorboard))
        if callback is not None:
            writers.append(callback)
        yield Tracker(
            model,
            functional_tracker(loss, **options),
            batches,
            every=every,
            optimizer=optimizer,
            preconditioned=preconditioned,
            writers=writers,
            steps=steps,
        )
