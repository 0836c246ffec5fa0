"""Training of a small classifier, for problems without pretrained weights.

`hessfunc.training.loop.train` draws the order of the examples and the numbers of layers from
streams of their own, which a checkpoint keeps. The weights of these problems come from torch's
seeded stream and a cosine schedule, and their published curvature depends on every bit of them.
Both trainings make the same `Steps`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from hessfunc.randomness import seeded
from hessfunc.training.evaluation import evaluated
from hessfunc.training.examples import Examples
from hessfunc.training.steps import first_order


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
    """Train a model with SGD on the cross-entropy, and return it in eval mode.

    Initial weights and the order of the examples depend on the seed only. The state of torch's
    random streams is not changed.

    Args:
        make_model: Function that builds the untrained model.
        examples: Training examples.
        epochs: Number of passes over the examples.
        batch_size: Number of examples per step.
        lr: Initial learning rate, which follows a cosine schedule.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        seed: Seed of the initial weights and of the order of the examples.
        on_epoch: Function that is called with the number of finished epochs and the mean loss
            over the last epoch.

    Raises:
        FloatingPointError: If the loss of a batch is not finite.
    """
    with seeded(seed):
        model = make_model().train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr, momentum=momentum, weight_decay=weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        steps = first_order(model, optimizer)
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(examples), device="cpu").split(batch_size):
                step = steps([(examples.inputs[batch], examples.targets[batch])])
                total += step.loss * len(batch)
            schedule.step()
            if on_epoch is not None:
                on_epoch(epoch + 1, total / len(examples))
    return model.eval()


def accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the fraction of correctly classified examples, in eval mode."""
    return evaluated(model, examples, F.cross_entropy).accuracy
