"""Loss and accuracy of a classifier on a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hessfunc.training.batches import Source
from hessfunc.training.examples import Examples
from hessfunc.training.steps import Criterion
from hessfunc.training_mode import eval_mode

_AT_ONCE = 500


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy as means over examples.

    Attributes:
        loss: Mean of the criterion.
        accuracy: Fraction of examples whose largest output is that of the target.
        examples: Number of examples.
    """

    loss: float
    accuracy: float
    examples: int


def evaluated(model: nn.Module, source: Source, criterion: Criterion, /) -> Evaluation:
    """Evaluate the model in eval mode on all examples.

    Raises:
        ValueError: If there is no example.
    """
    device = next(model.parameters()).device
    batches = source.batches(_AT_ONCE) if isinstance(source, Examples) else source
    total, hits, count = 0.0, 0, 0
    with torch.no_grad(), eval_mode(model):
        for inputs, targets in batches:
            outputs, expected = model(inputs.to(device)), targets.to(device)
            total += len(targets) * float(criterion(outputs, expected))
            hits += int((outputs.argmax(-1) == expected).sum())
            count += len(targets)
    if not count:
        raise ValueError("the loader is empty: pass at least one batch")
    return Evaluation(total / count, hits / count, count)
