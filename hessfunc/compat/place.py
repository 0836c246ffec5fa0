"""Unwrap models and move batches, as scripts for other libraries expect it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice
from hessfunc.containers import mapped
from hessfunc.losses import LossFunction, supervised
from hessfunc.modules import eval_mode, functional
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.hessian import filled


def bare(model: nn.Module, /) -> nn.Module:
    """Return the module without its wrapper for data parallelism."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def device_of(model: nn.Module, /) -> torch.device:
    """Return the device of the parameters."""
    return next(model.parameters()).device


def moved(batch: Any, device: torch.device, /) -> tuple[Any, Any]:
    """Return the inputs and targets of a batch, with all their tensors on a device.

    Raises:
        TypeError: If the batch is not a pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
        raise TypeError(
            f"a batch must be a pair (inputs, targets), but got a {type(batch).__name__}{size}: "
            "put the arguments of the model into inputs and those of the criterion into targets"
        )
    inputs, targets = mapped(lambda x: x.to(device), batch, "batch")
    return inputs, targets


def evaluated_loss(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], /
) -> tuple[LossFunction, dict[str, Tensor]]:
    """Return the loss of a model in eval mode, and its current parameters.

    The model is called with the inputs as one argument: a tensor, a tuple or a mapping. Batches are
    moved to the device of the parameters.
    """
    model = bare(model)
    with eval_mode(model):
        model_fn, params = functional(model)
    loss = supervised(lambda tree, inputs: model_fn(tree, (inputs,)), criterion)
    device = device_of(model)
    return lambda tree, batch: loss(tree, moved(batch, device)), params


def gradient_with_graph(
    loss: LossFunction, at: Mapping[str, Tensor], batches: Iterable[Any], /
) -> list[Tensor]:
    """Return the gradient of the mean loss over batches, weighted by examples, with its graph.

    The gradient of a parameter on which the loss does not depend is zero.
    """
    own = list(at.values())
    with differentiable_twice(own[0].device):
        counted = [(examples(batch), loss(at, batch)) for batch in batches]
        total = torch.stack([count * value for count, value in counted]).sum()
        mean = total / sum(count for count, _ in counted)
        gradient = torch.autograd.grad(mean, own, create_graph=True, allow_unused=True)
    return filled(gradient, own)


def seed_of_stream() -> int:
    """Draw a seed from torch's random stream."""
    return int(torch.randint(2**62, (), device="cpu"))
