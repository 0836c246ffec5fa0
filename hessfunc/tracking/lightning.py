"""Callback for the Lightning ``Trainer`` that tracks curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from hessfunc.tracking.points import Points
from hessfunc.tracking.tracker import Tracker, tracked


def _base() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).Callback
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(
        "the callback for the Lightning Trainer needs lightning: `pip install lightning`"
    )


class CurvatureCallback(_base()):  # type: ignore[misc]
    """Callback that measures at the start of a training and every few steps or epochs.

    It uses `tracked`.

    Args:
        criterion: Function ``(outputs, targets) -> scalar`` of the outputs of ``forward``.
        batches: Batches ``(inputs, targets)`` on which the curvature is measured, on the module's
            device.
        every: Number of steps or epochs between two measurements.
        unit: Unit of ``every``: ``"steps"`` of the optimiser, or ``"epochs"``.
        options: Options of `tracked` and of `functional_tracker`.

    Attributes:
        points: Measured points, in order.
    """

    def __init__(
        self,
        criterion: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        /,
        *,
        every: int = 100,
        unit: Literal["steps", "epochs"] = "steps",
        **options: Any,
    ) -> None:
        super().__init__()
        self.points = Points()
        self._criterion, self._batches, self._options = criterion, batches, options
        self._every, self._unit = every, unit
        self._open = ExitStack()
        self._tracker: Tracker | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._tracker = self._open.enter_context(
            tracked(
                pl_module,
                self._criterion,
                self._batches,
                every=self._every if self._unit == "steps" else None,
                optimizer=trainer.optimizers or None,
                steps=trainer.global_step,
                epoch=trainer.current_epoch,
                **self._options,
            )
        )
        self.points = self._tracker.points
        if self._unit == "epochs":
            self._tracker.measure(epoch=trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation, only the last batch makes a step of the optimiser.
        if self._tracker is not None and trainer.global_step > self._tracker.steps:
            self._tracker.step(trainer.global_step, epoch=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epochs = trainer.current_epoch + 1
        if self._tracker is not None and self._unit == "epochs" and epochs % self._every == 0:
            self._tracker.measure(epoch=epochs)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._open.close()
        self._tracker = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._open.close()
        self._tracker = None
