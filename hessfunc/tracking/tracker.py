"""Track curvature from any training loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc import modules
from hessfunc.losses import LossFunction, supervised
from hessfunc.modules import functional
from hessfunc.options import at_least, finite, validated
from hessfunc.tracking.measure import Point, Tracking, TrackingState, functional_tracker
from hessfunc.tracking.stability import adam_diagonal, edges
from hessfunc.tracking.undisturbed import refuse_busy_workers, undisturbed
from hessfunc.tracking.writers import ScalarWriter, json_lines, summary_writer, writing


class Tracker:
    """Tracker that measures a model every few steps of its training, made by `tracked`.

    Attributes:
        points: Measured points, in order.
        steps: Number of steps of the optimiser so far.
        state: Last eigenpairs with their vectors, from which the next point starts.
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
        # The names are fixed here: parameters that are frozen later still belong to the matrix.
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.state: TrackingState = method.init(self._params())

    @validated(epoch=finite)
    def step(
        self, steps: int | None = None, /, *, lr: float | None = None, epoch: float | None = None
    ) -> Point | None:
        """Record a step of the optimiser, and measure at every ``every``-th step.

        If steps are skipped, the measurement is made at the first recorded step after a multiple
        of ``every``.

        Args:
            steps: Number of steps so far. By default one more than at the last call.
            lr: Learning rate of the next step. By default the learning rate of the optimiser.
            epoch: Number of passes over the data so far.

        Returns:
            The measured point, or None if this step is not measured.
        """
        before, self.steps = self.steps, self.steps + 1 if steps is None else steps
        if self._every is None or self.steps // self._every <= before // self._every:
            return None
        return self.measure(lr=lr, epoch=epoch)

    @validated(epoch=finite)
    def measure(self, *, lr: float | None = None, epoch: float | None = None) -> Point:
        """Measure at the current step, for example at the end of an epoch.

        Args:
            lr: Learning rate of the next step. By default the learning rate of the optimiser.
            epoch: Number of passes over the data so far.

        Returns:
            The measured point.

        Raises:
            FloatingPointError: If the loss is finite but a product is not.
        """
        started = time.perf_counter()
        with undisturbed(self._model, self._batches):
            self.state, measurement = self._method.measure(
                self.state, self._params(), self._batches, self._preconditioner()
            )
        edge, preconditioned_edge = edges(self._optimizer, lr)
        point = Point(
            **vars(measurement),
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
        parameters = dict(self._model.named_parameters())
        return {name: parameters[name].detach() for name in self._names}

    def _lr(self) -> float | None:
        return None if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"])

    def _preconditioner(self) -> dict[str, Tensor] | None:
        # Before its first step, Adam has no second moments.
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
    """Track the curvature of a model while it trains, in any training loop.

        with tracked(model, criterion, [batch], every=10, optimizer=optimizer) as tracker:
            for inputs, targets in loader:
                ...
                optimizer.step()
                tracker.step()

    Tracking does not change a single bit of the training. Parameters, buffers, gradients, training
    flags, and the random streams of Python, NumPy, torch and the loader keep their state.

    Args:
        model: Module that is trained.
        criterion: Function ``(outputs, targets) -> scalar``.
        batches: Batches on which the curvature is measured, a list or a loader. Use the same
            batches at each point; otherwise the curve also shows differences between batches.
        every: Number of steps between two measurements. None measures only when ``measure`` is
            called.
        optimizer: Optimiser whose learning rate is recorded, with the curvature up to which its
            steps are stable.
        preconditioned: Whether the preconditioned sharpness is measured, from the first step of
            the optimiser. The optimiser must be Adam or AdamW.
        compose: Function that makes the loss from the pure model function and the criterion:
            `supervised`, or `composed` for a criterion ``(outputs, batch) -> scalar``.
        eval_mode: Whether to measure in eval mode. If False, the model is measured in its mode
            when `tracked` is called.
        out: File to which each point is appended as one line of JSON. Each line is on the disk
            before the training continues.
        tensorboard: Folder for TensorBoard, or a writer with ``add_scalar`` and ``flush``.
        callback: Function called with each point.
        steps: Number of steps before this call, if a training is resumed.
        options: Options of `functional_tracker`, which select the quantities and their accuracy.

    Returns:
        A context manager that yields a `Tracker`.

    Raises:
        ValueError: If an option is out of range, or if the loader has persistent workers.
        TypeError: If ``preconditioned`` is True and the optimiser is not Adam or AdamW.
        ModuleNotFoundError: If tensorboard is not installed.

    Cost: the cost of `functional_tracker` at each point.
    """
    at_least(1, every=every)
    refuse_busy_workers(batches)
    if preconditioned and not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(
            "preconditioned=True needs an Adam or AdamW optimiser, but got "
            f"{type(optimizer).__name__}: pass `optimizer=optimizer`"
        )
    with modules.eval_mode(model) if eval_mode else nullcontext():
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
