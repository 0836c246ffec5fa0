"""Norms composed of torch functions, with right derivatives of every order, in every mode.

torch treats the statistics of its fused norms as constant in their second derivative, so that
third derivatives are wrong without an error. The compositions also run under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.overrides import Replacements
from hessfunc.numerics import widened


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = _last(len(normalized_shape))
    return _affine(_standardised(widened(input), axes, eps), weight, bias, input.dtype)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    x = widened(input)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    z = x * torch.rsqrt((x * x).mean(_last(len(normalized_shape)), keepdim=True) + eps)
    return _affine(z, weight, None, input.dtype)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if input.dim() < 2 or input.shape[1] % num_groups:
        return F.group_norm(input, num_groups, weight, bias, eps)
    groups = widened(input).unflatten(1, (num_groups, -1))
    axes = tuple(range(2, groups.dim()))
    z = _standardised(groups, axes, eps).view_as(input)
    return _affine_by_channel(z, weight, bias, input.dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if use_input_stats and input.shape[2:].numel() == 1:
        # torch raises its error for statistics of a single value.
        return F.instance_norm(input)
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    z = _standardised(widened(input), tuple(range(2, input.dim())), eps)
    return _affine_by_channel(z, weight, bias, input.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Compute ``F.batch_norm`` without updating the running statistics in train mode.

    They do not influence the result, and an update would change a buffer inside a transform.
    """
    x = widened(input)
    if training and input.numel() > input.shape[1]:
        z = _standardised(x, (0, *range(2, input.dim())), eps)
    elif training or running_mean is None or running_var is None:
        # torch raises its error for statistics of a single value, and for missing ones.
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        mean, variance = _by_channel(running_mean, x), _by_channel(running_var, x)
        z = (x - mean) * torch.rsqrt(variance + eps)
    return _affine_by_channel(z, weight, bias, input.dtype)


def _batch_norm_of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    # torch.batch_norm has another order of arguments than F.batch_norm.
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm_of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    known = running_mean, running_var, weight, bias
    return _instance_norm(input, *known, use_input_stats, momentum, eps)


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, axes = widened(input), _last(len(normalized_shape))
    mean, scale = _statistics(x, axes, eps)
    return _affine((x - mean) * scale, weight, bias, input.dtype), mean, scale


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if training and input.numel() > input.shape[1]:
        x = widened(input)
        mean, scale = _statistics(x, (0, *range(2, input.dim())), eps)
        y = _affine_by_channel((x - mean) * scale, weight, bias, input.dtype)
        return y, mean.flatten(), scale.flatten()
    y = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return y, y.new_empty(0), y.new_empty(0)


def _native_batch_norm_legit(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # The overload without running statistics has two arguments fewer.
    known = rest if len(rest) == 5 else (None, None, *rest)
    return _native_batch_norm(input, weight, bias, *known)


def _last(count: int) -> tuple[int, ...]:
    return tuple(range(-count, 0))


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Return (x - mean x) (var x + eps)^-1/2, with statistics over some axes."""
    mean, scale = _statistics(x, axes, eps)
    return (x - mean) * scale


def _statistics(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Return mean x and (var x + eps)^-1/2."""
    mean = x.mean(axes, keepdim=True)
    return mean, torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + eps)


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    z = z if weight is None else z * weight
    z = z if bias is None else z + bias
    return z.to(dtype)


def _affine_by_channel(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    weight, bias = (None if v is None else _by_channel(v, z) for v in (weight, bias))
    return _affine(z, weight, bias, dtype)


def _by_channel(vector: Tensor, z: Tensor) -> Tensor:
    """Return a vector with one entry for each channel, in a shape that broadcasts against z."""
    return vector.view(-1, *[1] * (z.dim() - 2))


# Norms whose second derivatives in torch are right, and faster than those of a composition.
NORMS: Replacements = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm_of_torch,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm_of_torch,
}

# Norms that return their statistics, whose derivatives torch drops in reverse mode.
WITH_STATISTICS: Replacements = {
    torch.native_layer_norm: _native_layer_norm,
    torch.native_batch_norm: _native_batch_norm,
    torch._native_batch_norm_legit: _native_batch_norm_legit,
}
