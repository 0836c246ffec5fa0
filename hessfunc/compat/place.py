"""Unwrap models and move batches, as scripts for other libraries expect it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.constant_matrix import leaves_of_graph
from hessfunc.containers import mapped
from hessfunc.losses import LossFunction, supervised
from hessfunc.modules import bare, functional
from hessfunc.training_mode import eval_mode
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.evaluation import gradient_of, scalar
from hessfunc.transforms.hessian import hvp
from hessfunc.transforms.matvecs.arithmetic import batched
from hessfunc.trees import Matvec


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


def hessian_of(loss: LossFunction, own: Sequence[Tensor], /) -> Curvature:
    """Return the Hessian of a loss, also if its criterion reads the parameters of the model itself.

    A criterion with a penalty such as ``sum(p.square().sum() for p in model.parameters())`` does
    not depend on the arguments of the loss. Its products are then derivatives with respect to the
    model's own parameters, which keep one graph for each batch.

    Args:
        loss: Function ``(params, batch) -> scalar``.
        own: Parameters of the model, in the order of ``params``.

    Cost: that of `hvp`, and one evaluation of the first batch.
    """
    reads: list[bool] = []
    ordinary = hvp(loss)

    def curvature(params: Mapping[str, Tensor], batch: Any) -> Matvec:
        if not reads:
            reads.append(_reads(loss, params, batch, own))
        return _by_graph(loss, params, batch, own) if reads[0] else ordinary(params, batch)

    return curvature


def _reads(
    loss: LossFunction, params: Mapping[str, Tensor], batch: Any, own: Sequence[Tensor]
) -> bool:
    """Return whether a loss depends on other tensors than ``params`` and the batch."""
    with torch.enable_grad():
        value = scalar(loss({name: p.detach() for name, p in params.items()}, batch))
    return not {id(p) for p in own}.isdisjoint(map(id, leaves_of_graph([value], [])))


def _by_graph(
    loss: LossFunction, params: Mapping[str, Tensor], batch: Any, own: Sequence[Tensor]
) -> Matvec:
    gradient = gradient_with_graph(loss, dict(zip(params, own, strict=True)), [batch])
    curved = [i for i, g in enumerate(gradient) if g.requires_grad]

    def product(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        along = list(vector.values())
        # H v is the derivative of g'v.
        products = torch.autograd.grad(
            [gradient[i] for i in curved],
            list(own),
            [along[i] for i in curved],
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(params, products, strict=True))

    return batched(product, chunk_size=1)


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
        return gradient_of(total / sum(count for count, _ in counted), own, create_graph=True)


def seed_of_stream() -> int:
    """Draw a seed from torch's random stream."""
    return int(torch.randint(2**62, (), device="cpu"))
