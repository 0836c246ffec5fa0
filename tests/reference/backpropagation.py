"""Backpropagated curvature by its definition: dense Jacobians, example by example."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import hessfunc as hf
from tests.reference import block_diagonal, flat, gauss_newton, gradient, hessian, jacobian


def exact_blocks(loss: hf.Loss, params: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """The diagonal blocks of the Hessian by parameter, from its entries."""
    whole = hessian(loss, dict(params), batch)
    sizes = [leaf.numel() for leaf in params.values()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        name: whole[start : start + size, start : start + size]
        for name, start, size in zip(params, starts, sizes, strict=True)
    }


def replaced(matrix: Tensor, residual: str) -> Tensor:
    """A symmetric matrix with its negative eigenvalues kept, dropped, cut off or turned around."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = {
        "none": values,
        "zero": torch.zeros_like(values),
        "clip": values.clamp_min(0),
        "abs": values.abs(),
    }[residual]
    return (vectors * kept) @ vectors.mT


def backpropagated(
    model: nn.Sequential,
    loss: hf.Loss,
    batch: Any,
    *,
    residual: str,
    average_input_jacobian: bool,
    average_parameter_jacobian: bool,
) -> dict[str, Tensor]:
    """The block of each parameter of a chain of modules."""
    values = [batch[0]]
    for module in model:
        values.append(module(values[-1]).detach())
    count = len(batch[0])

    def rest(z: Tensor, start: int) -> Tensor:
        return loss.criterion(model[start:](z), batch)

    whole = torch.func.hessian(lambda z: loss.criterion(z, batch))(values[-1])
    width = values[-1][0].numel()
    whole = whole.reshape(count, width, count, width)
    back = sum(whole[b, :, b] for b in range(count))
    blocks: dict[str, Tensor] = {}
    for number in reversed(range(len(model))):
        module, inputs, outputs = model[number], values[number], values[number + 1]
        slope = torch.func.grad(rest)(outputs, number + 1).flatten(1)
        for name, parameter in module.named_parameters():
            blocks[f"{number}.{name}"] = _through(
                partial(_of_parameter, module, name, inputs),
                [parameter.detach()] * count,
                back,
                slope,
                residual,
                average_parameter_jacobian,
            )

        back = _through(
            partial(_of_input, module), list(inputs), back, slope, residual, average_input_jacobian
        )
    return blocks


def _of_input(module: nn.Module, x: Tensor, b: int) -> Tensor:
    return module(x[None]).flatten()


def _of_parameter(module: nn.Module, name: str, inputs: Tensor, theta: Tensor, b: int) -> Tensor:
    own = {**dict(module.named_parameters()), name: theta}
    return functional_call(module, own, (inputs[b : b + 1],)).flatten()


def _through(
    function: Any, at: list[Tensor], back: Tensor, slope: Tensor, residual: str, average: bool
) -> Tensor:
    size = at[0].numel()
    jacobians = torch.stack(
        [jacrev(function)(x, b).reshape(-1, size) for b, x in enumerate(at)]
    ).detach()
    if average:
        inner = jacobians.mean(0).mT @ back @ jacobians.mean(0)
    else:
        inner = torch.stack([j.mT @ back @ j for j in jacobians]).mean(0)
    second = torch.zeros(size, size, dtype=back.dtype)
    for b, x in enumerate(at):
        along = torch.func.hessian(lambda value, b=b: function(value, b) @ slope[b])
        second += along(x).reshape(size, size).detach()
    return inner + replaced(second, residual)


def positive_curvature(net: Any, residual: str) -> Tensor:
    """Positive-curvature matrix, example by example, with a dense Jacobian of every activation."""
    total = gauss_newton(net.loss, net.params, net.batch)
    x, y = net.batch
    for one, target in zip(x.split(1), y.split(1), strict=True):

        def loss(offsets: Any, _: Any, one: Tensor = one, target: Tensor = target) -> Tensor:
            return F.cross_entropy(net.moved(offsets, one), target) / len(y)

        read = net.read(net.params, one)
        offsets = [torch.zeros_like(net.activation(a)) for a in read]
        slopes = gradient(loss, offsets, None).split([o.numel() for o in offsets])
        for i, (a, slope) in enumerate(zip(read, slopes, strict=True)):
            curvature = hessian(lambda a, g: (flat(net.activation(a)) * g).sum(), a, slope)
            J = jacobian(lambda p, one=one, i=i: net.read(p, one)[i], net.params)
            total = total + J.mT @ replaced(curvature, residual) @ J
    return block_diagonal(total, net.params)
