"""Training of a small classifier, for problems that have no pretrained weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from hessfunc.training.examples import Examples
from hessfunc.training.stream import seeded


def train(
    make_model: Callable[[], nn.Module],
    examples: Examples,
    *,
    epochs: int = 15,
    batch_size: int = 64,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train with SGD on the cross-entropy; the model comes back in eval mode.

    Initial weights and the order of the examples are functions of the seed; torch's random streams
    stay as they were.

    Args:
        make_model: builds the untrained model.
        on_epoch: called with the number of finished epochs and the mean loss over the last one.
    """
    with seeded(seed):
        model = make_model().train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=momentum, weight_decay=weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for epoch in range(epochs):
            order = torch.randperm(len(examples))
            total = 0.0
            for batch in order.split(batch_size):
                loss = F.cross_entropy(model(examples.inputs[batch]), examples.targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            schedule.step()
            if on_epoch is not None:
                on_epoch(epoch + 1, total / len(examples))
    return model.eval()


def accuracy(model: nn.Module, examples: Examples, *, batch_size: int = 500) -> float:
    """The share of examples whose largest output is the target's, in the mode the model is in."""
    with torch.no_grad():
        hits = sum(
            int((model(inputs).argmax(-1) == targets).sum())
            for inputs, targets in examples.batches(batch_size)
        )
    return hits / len(examples)
