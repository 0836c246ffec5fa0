"""Callback for the Hugging Face ``Trainer`` that tracks curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal

from torch import Tensor

try:
    from transformers import TrainerCallback
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "the callback for the Hugging Face Trainer needs transformers: `pip install transformers`"
    ) from None

from hessfunc.losses import LossFunction, composed
from hessfunc.tracking.points import Points
from hessfunc.tracking.tracker import Tracker, tracked


def _own_loss(outputs: Any, batch: Any) -> Tensor:
    return outputs.loss


class CurvatureCallback(TrainerCallback):
    """Callback that measures at the start of a training and every few steps or epochs.

    It uses `tracked`.

    Args:
        batches: Batches on which the curvature is measured. Each is a mapping of the model's
            arguments on its device, including the labels.
        every: Number of steps or epochs between two measurements.
        unit: Unit of ``every``: ``"steps"`` of the optimiser, or ``"epochs"``.
        criterion: Function ``(outputs, batch) -> scalar``. The default is the model's own loss.
        compose: Function that makes a loss from the pure model function and the criterion.
        options: Options of `tracked` and of `functional_tracker`.

    Attributes:
        points: Measured points, in order.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        /,
        *,
        every: int = 100,
        unit: Literal["steps", "epochs"] = "steps",
        criterion: Callable[[Any, Any], Tensor] = _own_loss,
        compose: Callable[..., LossFunction] = composed,
        **options: Any,
    ) -> None:
        self.points = Points()
        self._batches, self._every, self._unit = batches, every, unit
        self._criterion, self._options = criterion, {"compose": compose, **options}
        self._open = ExitStack()
        self._tracker: Tracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        optimizer = kwargs.get("optimizer")
        self._tracker = self._open.enter_context(
            tracked(
                kwargs["model"],
                self._criterion,
                self._batches,
                every=self._every if self._unit == "steps" else None,
                # Accelerate wraps the optimiser in one that has it as an attribute.
                optimizer=getattr(optimizer, "optimizer", optimizer),
                steps=state.global_step,
                epoch=state.epoch,
                **self._options,
            )
        )
        self.points = self._tracker.points
        if self._unit == "epochs":
            self._tracker.measure(epoch=state.epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._tracker is not None:
            self._tracker.step(state.global_step, epoch=state.epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = self._unit == "epochs" and round(state.epoch) % self._every == 0
        if self._tracker is not None and due:
            self._tracker.measure(epoch=state.epoch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()
        self._tracker = None
