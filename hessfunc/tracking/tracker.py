"""Track curvature from any training loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessfunc import training_mode
from hessfunc.display import Reported, reporting
from hessfunc.losses import LossFunction, supervised
from hessfunc.modules import bare, functional
from hessfunc.optim.stability import limit
from hessfunc.optim.stability.result import Stability, UnknownStability
from hessfunc.options import at_least, finite, optimizers, or_none, path, validated
from hessfunc.options.data import logger
from hessfunc.tracking.frozen import outside_inference, refuse_changing
from hessfunc.tracking.measure import Limit, Point, Tracking, TrackingState, functional_tracker
from hessfunc.tracking.points import Points
from hessfunc.tracking.undisturbed import refuse_busy_workers, undisturbed
from hessfunc.tracking.writers import (
    ScalarWriter,
    WandbRun,
    csv_rows,
    json_lines,
    logging,
    summary_writer,
    writing,
)
from hessfunc.trees import Tree

P = ParamSpec("P")


class Tracker:
    """Tracker that measures a model every few steps of its training, made by `tracked`.

    Attributes:
        points: Measured points, in order.
        steps: Number of steps of the optimiser so far.
        state: Last eigenpairs with their vectors, from which the next point starts.
    """

    def __repr__(self) -> str:
        last = f", last={self.points[-1]}" if self.points else ""
        return f"Tracker(points={len(self.points)}, steps={self.steps}{last})"

    def __init__(
        self,
        model: nn.Module,
        method: Tracking,
        batches: Iterable[Any],
        /,
        *,
        every: int | None,
        optimizers: Sequence[Optimizer],
        preconditioned: bool,
        stability: Limit | None,
        writers: Iterable[Callable[[Point], object]],
        steps: int,
    ) -> None:
        self.points = Points()
        self.steps = steps
        self._model, self._method, self._batches = model, method, batches
        self._every, self._optimizers, self._writers = every, optimizers, tuple(writers)
        self._preconditioned, self._stability = preconditioned, stability
        self._is_known = limit.is_known(optimizers)
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
        # Hooks of trainers may run in inference mode, in which nothing can be differentiated.
        with (
            undisturbed(self._model, self._batches),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            self.state, measurement = self._method.measure(
                self.state, self._params(), outside_inference(self._batches), self._limit(lr)
            )
        point = Point(
            **vars(measurement),
            step=self.steps,
            epoch=epoch,
            lr=self._lr() if lr is None else lr,
            edge=self._edge(lr),
            optimizer=limit.name_of(self._optimizers) if self._is_known else None,
            seconds=time.perf_counter() - started,
        )
        self.points.append(point)
        for write in self._writers:
            write(point)
        return point

    def _params(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    def _parameters(self) -> dict[str, nn.Parameter]:
        parameters = dict(self._model.named_parameters())
        return {name: parameters[name] for name in self._names}

    def _lr(self) -> float | None:
        rate = self._optimizers[0].param_groups[0]["lr"] if self._optimizers else None
        return None if rate is None else float(rate)

    def _limit(self, lr: float | None) -> Limit | None:
        """Return the stability limit of the next step, or a function of the gradient."""
        if not self._preconditioned:
            return None
        if self._stability is not None:
            return self._stability
        if limit.is_normed(self._optimizers):
            return lambda gradient: self._read(lr, gradient)
        return self._read(lr)

    def _edge(self, lr: float | None) -> float | None:
        """Return the largest stable eigenvalue of the Hessian itself, for gradient descent."""
        if not self._is_known or not limit.is_gradient_descent(self._optimizers):
            return None
        stability = self._read(lr)
        return None if stability is None else stability.edge

    def _read(self, lr: float | None, gradient: Tree | None = None) -> Stability | None:
        try:
            parameters = self._parameters()
            return limit.stability_of(self._optimizers, parameters, gradient=gradient, lr=lr)
        except UnknownStability:
            # For example, Adam has no second moments before its first step.
            return None


class _Context(AbstractContextManager[Tracker]):
    """Context manager of `tracked`, which names the ``with`` that a caller has forgotten."""

    def __init__(self, inner: AbstractContextManager[Tracker]) -> None:
        self._inner = inner

    def __enter__(self) -> Tracker:
        return self._inner.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._inner.__exit__(*raised)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"`tracked` returns a context manager without {name!r}: use `with tracked(...) as "
            f"tracker:` and `tracker.{name}` inside"
        )


def _as_context(
    tracker: Callable[P, Iterator[Tracker]],
) -> Callable[P, AbstractContextManager[Tracker]]:
    @wraps(tracker)
    def made(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[Tracker]:
        return _Context(contextmanager(tracker)(*args, **kwargs))

    return made


@validated(optimizer=or_none(optimizers), csv=path, wandb=logger, epoch=finite)
@_as_context
def tracked(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    /,
    *,
    every: int | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    preconditioned: bool = False,
    stability: Limit | None = None,
    compose: Callable[..., LossFunction] = supervised,
    eval_mode: bool = True,
    out: str | os.PathLike[str] | None = None,
    csv: str | os.PathLike[str] | None = None,
    tensorboard: str | os.PathLike[str] | ScalarWriter | None = None,
    wandb: WandbRun | None = None,
    callback: Callable[[Point], object] | None = None,
    progress: Reported = None,
    steps: int = 0,
    epoch: float | None = None,
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

    With ``DistributedDataParallel``, every rank makes the same measurements, and rank 0 writes
    them.

    Args:
        model: Module that is trained, with or without its wrapper for data parallelism.
        criterion: Function ``(outputs, targets) -> scalar``.
        batches: Batches on which the curvature is measured, a list or a loader, with the same
            examples in each pass. `frozen` makes such a list.
        every: Number of steps between two measurements, the first of which is made at once. None
            measures only when ``measure`` is called.
        optimizer: Optimiser whose learning rate is recorded, with the curvature up to which its
            steps are stable, or a list of optimisers that train the model together. Wrappers of
            Accelerate are unwrapped.
        preconditioned: Whether to measure the sharpness that limits the steps of the optimiser,
            with its threshold, from the first step on. `stability` must know the optimiser.
        stability: `Stability`, or a function from the gradient to a `Stability`, for an optimiser
            that is not known, with ``preconditioned=True``. By default that of the optimiser.
        compose: Function that makes the loss from the pure model function and the criterion:
            `supervised`, or `composed` for a criterion ``(outputs, batch) -> scalar``.
        eval_mode: Whether to measure in eval mode. If False, the model is measured in its mode
            when `tracked` is called.
        out: File to which each point is appended as one line of JSON. Each line is on the disk
            before the training continues.
        csv: File to which each point is appended as one row of comma-separated values.
        tensorboard: Folder for TensorBoard, or a writer with ``add_scalar`` and ``flush``.
        wandb: Run of Weights & Biases, as ``wandb.init()`` returns it, or any object with ``log``.
            Points are plotted against ``curvature/step``, so that the steps of the run stay free.
        callback: Function called with each point.
        progress: Function of a `Progress`, called after each point with the largest eigenvalue;
            True for a bar or lines, as in `RunOptions`.
        steps: Number of steps before this call, if a training is resumed.
        epoch: Number of passes over the data before this call, recorded with the first point.
        options: Options of `functional_tracker`, which select the quantities and their accuracy.

    Returns:
        A context manager that yields a `Tracker`.

    Raises:
        ValueError: If an option is out of range, if two passes over a loader have different
            examples (random augmentation), or if the loader has persistent workers.
        TypeError: If ``preconditioned`` is True and the optimiser is not one that `stability`
            knows, or if the batches can be read only once.
        ModuleNotFoundError: If tensorboard is not installed.

    Cost: the cost of `functional_tracker` at each point, and two passes over a loader at the start.
    """
    at_least(1, every=every)
    refuse_busy_workers(batches)
    refuse_changing(batches)
    if isinstance(optimizer, Optimizer):
        optimizer = [optimizer]
    # Accelerate wraps an optimiser in another one that has it as an attribute.
    trained_by = [getattr(each, "optimizer", each) for each in optimizer or ()]
    if preconditioned and stability is None:
        if not trained_by:
            raise TypeError("preconditioned=True needs an optimiser: pass `optimizer=optimizer`")
        limit.refuse_unknown(trained_by)
    if stability is not None and not preconditioned:
        raise ValueError("stability is measured only with preconditioned=True: pass both")
    if isinstance(model, nn.parallel.DistributedDataParallel) and torch.distributed.get_rank():
        out = csv = tensorboard = wandb = callback = progress = None
    model = bare(model)
    with training_mode.eval_mode(model) if eval_mode else nullcontext():
        loss = compose(functional(model)[0], criterion)
    with ExitStack() as stack:
        writers: list[Callable[[Point], object]] = []
        if out is not None:
            writers.append(json_lines(out))
        if csv is not None:
            top, bottom = options.get("top", 1), options.get("bottom", 0)
            writers.append(csv_rows(csv, top=top, bottom=bottom))
        if isinstance(tensorboard, (str, os.PathLike)):
            writers.append(writing(stack.enter_context(closing(summary_writer(tensorboard)))))
        elif tensorboard is not None:
            writers.append(writing(tensorboard))
        if wandb is not None:
            writers.append(logging(wandb))
        if callback is not None:
            writers.append(callback)
        report = stack.enter_context(reporting(progress, "tracked", total=None, unit="steps"))
        if report is not None:
            writers.append(lambda point: report(point.step, point.achieved()))
        tracker = Tracker(
            model,
            functional_tracker(loss, **options),
            batches,
            every=every,
            optimizers=trained_by,
            preconditioned=preconditioned,
            stability=stability,
            writers=writers,
            steps=steps,
        )
        if every is not None:
            tracker.measure(epoch=epoch)
        yield tracker
