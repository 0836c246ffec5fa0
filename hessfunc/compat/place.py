"""Models as their scripts pass them, and batches where the parameters lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.containers import mapped
from hessfunc.losses import LossFunction, supervised
from hessfunc.modules import eval_mode, functional


def bare(model: nn.Module, /) -> nn.Module:
    """The model itself, where it is wrapped for data parallelism."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def device_of(model: nn.Module, /) -> torch.device:
    """Where the parameters lie."""
    return next(model.parameters()).device


def moved(batch: Any, device: torch.device, /) -> tuple[Any, Any]:
    """The inputs and targets of a batch, with all their tensors on a device.

    Raises:
        TypeError: it is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
        raise TypeError(
            f"a batch is a pair (inputs, targets), and this is a {type(batch).__name__}{size}: "
            "gather what the model takes into inputs, and what the criterion takes into targets"
        )
    inputs, targets = mapped(lambda x: x.to(device), batch, "batch")
    return inputs, targets


def evaluated_loss(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], /
) -> tuple[LossFunction, dict[str, Tensor]]:
    """The loss of a model in eval mode, and the parameters as they are now.

    The model is called with the inputs as they are, be they a tensor, a tuple or a mapping. A batch
    is brought to where the parameters lie.
    """
    model = bare(model)
    with eval_mode(model):
        model_fn, params = functional(model)
    loss = supervised(lambda found, inputs: model_fn(found, (inputs,)), criterion)
    device = device_of(model)
    return lambda found, batch: loss(found, moved(batch, device)), params


def seed_of_stream() -> int:
    """A seed drawn from torch's random stream."""
    return int(torch.randint(2**62, (), device="cpu"))
