"""Compositions of torch functions with right derivatives of every order, in every mode.

torch treats the statistics of its fused norms as constant in their second derivative, so that
third derivatives are wrong without an error. The compositions also run under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.attention import ATTENTION
from hessfunc.autograd.forward_mode import FORWARD
from hessfunc.autograd.overrides import Replacements
from hessfunc.autograd.recurrent import RECURRENT
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


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = tuple(axis for axis in range(v.dim()) if axis != dim)
    return v * (g * torch.rsqrt((v * v).sum(axes, keepdim=True)))


def _logsigmoid(input: Tensor) -> Tensor:
    # vmap of the derivatives of the original warns. exp(-40) is below the rounding of float64.
    return -F.softplus(-input, threshold=40.0)


def _last(count: int) -> tuple[int, ...]:
    return tuple(range(-count, 0))


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Return (x - mean x) (var x + eps)^-1/2, with statistics over some axes."""
    centred = x - x.mean(axes, keepdim=True)
    variance = (centred * centred).mean(axes, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


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


TRANSFORMABLE: Replacements = {
    **FORWARD,
    **ATTENTION,
    **RECURRENT,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    torch._weight_norm: _weight_norm,
    F.logsigmoid: _logsigmoid,
}
