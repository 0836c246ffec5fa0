"""Records of a training."""

from dataclasses import replace
from typing import Any

from hessfunc.training.loop import Record


def record(**changed: Any) -> Record:
    """A record of a training in its first epoch, with changed fields."""
    return replace(
        Record(
            step=1,
            epoch=0.5,
            loss=2.0,
            minibatch_loss=None,
            accuracy=0.25,
            test_loss=None,
            test_accuracy=None,
            matvecs=3,
            gradients=4.5,
            seconds=0.25,
            peak_bytes=2**20,
        ),
        **changed,
    )
