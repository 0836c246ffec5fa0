"""Rules of Kronecker factors, for functions of torch that are linear in a parameter.

There are rules for dense maps, convolutions and their transposes, lookups and their sums over bags,
and products and sums of entries, for which each entry of the parameter is a group of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.kronecker.convolutions import convolution, transposed_convolution
from hessfunc.kronecker.linear_maps import Layout, LinearMap, OneHot

# Function of the output and the arguments of a call, which yields each argument that may be a
# parameter, with the dependence of the output on it.
FactorRule: TypeAlias = Callable[..., Iterator[tuple[Tensor, LinearMap]]]


def maps_of(
    function: Any, output: Tensor, args: Any, kwargs: Mapping[str, Any], /
) -> list[tuple[Tensor, LinearMap]]:
    """Return the arguments on which a call depends linearly.

    The list is empty if the function has no rule, or if its rule does not know an argument.
    """
    if (rule := _FACTOR_RULES.get(function)) is None:
        return []
    try:
        maps = rule(output, *args, **kwargs)
    except TypeError:
        return []
    return list(maps)


def is_lookup(function: Any, /) -> bool:
    """Return whether a function selects rows of a parameter by their indices."""
    return function is F.embedding


def _dense(
    weight: Tensor, x: Tensor, *, is_transposed: bool = False, scale: float = 1
) -> LinearMap:
    """Return the dependence of ``scale x W'``, or of ``scale x W``, on W."""
    layout = Layout((1, *weight.shape), (0, 2, 1) if is_transposed else (0, 1, 2))
    _, outputs, inputs = layout.sizes
    return LinearMap(
        layout,
        lambda gradient: gradient.reshape(-1, 1, outputs, 1),
        lambda: (scale * x.detach().to_dense()).reshape(-1, 1, inputs, 1),
        x if scale == 1 else None,
    )


def _offset(bias: Tensor, output: Tensor, scale: float = 1) -> LinearMap | None:
    """Return the dependence of ``x + scale b`` on b, with the outputs along the last axis."""
    count = bias.numel()
    if scale != 1 or bias.shape != output.shape[-1:]:
        return _constant(bias, output, scale)
    return LinearMap(
        Layout((1, count, 1)),
        lambda gradient: gradient.reshape(-1, 1, count, 1),
        lambda: bias.detach().new_ones(1, 1, 1, 1),
    )


def _linear(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[tuple[Tensor, LinearMap]]:
    if weight.dim() != 2:
        return
    yield weight, _dense(weight, input)
    if bias is not None and (made := _offset(bias, output)) is not None:
        yield bias, made


def _matmul(output: Tensor, input: Tensor, other: Tensor) -> Iterator[tuple[Tensor, LinearMap]]:
    if other.dim() == 2 and input.dim() > 1:
        yield other, _dense(other, input, is_transposed=True)


def _mm(output: Tensor, input: Tensor, mat2: Tensor) -> Iterator[tuple[Tensor, LinearMap]]:
    return _matmul(output, input, mat2)


def _addmm(
    output: Tensor,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Iterator[tuple[Tensor, LinearMap]]:
    if (made := _offset(input, output, beta)) is not None:
        yield input, made
    yield mat2, _dense(mat2, mat1, is_transposed=True, scale=alpha)


def _bilinear(
    output: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[tuple[Tensor, LinearMap]]:
    outputs, inputs = len(weight), weight[0].numel()
    yield (
        weight,
        LinearMap(
            Layout((1, outputs, inputs)),
            lambda gradient: gradient.reshape(-1, 1, outputs, 1),
            # z_o = sum_ij W[o, i, j] x_i y_j.
            lambda: torch.einsum("...i,...j->...ij", input1.detach(), input2.detach()).reshape(
                -1, 1, inputs, 1
            ),
        ),
    )
    if bias is not None and (made := _offset(bias, output)) is not None:
        yield bias, made


def _lookup(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Iterator[tuple[Tensor, LinearMap]]:
    size, width = weight.shape
    indices = input.detach()
    if padding_idx is not None:
        # The row of the padding has no gradient.
        indices = indices.masked_fill(indices == padding_idx % size, size)
    rows = indices.expand(output.shape[:-1]).reshape(-1, 1)
    yield (
        weight,
        LinearMap(
            Layout((1, size, width), (0, 2, 1)),
            lambda gradient: gradient.reshape(-1, 1, width, 1),
            lambda: OneHot(rows, size),
        ),
    )


def _bags(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Iterator[tuple[Tensor, LinearMap]]:
    if mode == "max" or scale_grad_by_freq or max_norm is not None:
        return
    size, width = weight.shape

    def inputs() -> Tensor:
        # A bag is a dense map of the weights of its indices: their sum, or their mean.
        unit = torch.eye(size, dtype=weight.dtype, device=weight.device)
        rows = F.embedding_bag(
            input,
            unit,
            offsets,
            mode=mode,
            per_sample_weights=None if per_sample_weights is None else per_sample_weights.detach(),
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )
        return rows[:, None, :, None]

    yield (
        weight,
        LinearMap(
            Layout((1, size, width), (0, 2, 1)),
            lambda gradient: gradient.reshape(-1, 1, width, 1),
            inputs,
        ),
    )


def _entrywise(parameter: Tensor, output: Tensor, values: Callable[[], Tensor]) -> LinearMap | None:
    """Return the dependence of ``w * values``, broadcast to the output, on each entry of w."""
    axes = [1] * (output.dim() - parameter.dim()) + list(parameter.shape)
    lead = next((i for i, size in enumerate(axes) if size > 1), len(axes) - 1)
    if lead <= 0:
        return None
    own = [i for i in range(lead, len(axes)) if axes[i] > 1]
    others = [i for i in range(lead, len(axes)) if axes[i] == 1]
    count = parameter.numel()
    shape, ones = output.shape, output.detach().new_ones(())

    def rows(tensor: Tensor) -> Tensor:
        rows = tensor.reshape(-1, *tensor.shape[lead:])
        order = (0, *(i - lead + 1 for i in own), *(i - lead + 1 for i in others))
        return rows.permute(order).reshape(len(rows), count, 1, -1)

    return LinearMap(
        Layout((count, 1, 1), is_entrywise=True),
        rows,
        lambda: rows((values() * ones).detach().expand(shape)),
    )


def _product(output: Tensor, input: Any, other: Any) -> Iterator[tuple[Tensor, LinearMap]]:
    for factor, rest in ((input, other), (other, input)):
        values = partial(torch.as_tensor, rest, dtype=output.dtype, device=output.device)
        if isinstance(factor, Tensor) and (made := _entrywise(factor, output, values)) is not None:
            yield factor, made


def _sum(
    output: Tensor, input: Any, other: Any, *, alpha: float = 1
) -> Iterator[tuple[Tensor, LinearMap]]:
    for term, scale in ((input, 1), (other, alpha)):
        if isinstance(term, Tensor) and (made := _constant(term, output, scale)) is not None:
            yield term, made


def _difference(
    output: Tensor, input: Any, other: Any, *, alpha: float = 1
) -> Iterator[tuple[Tensor, LinearMap]]:
    return _sum(output, input, other, alpha=-alpha)


def _expanded(
    output: Tensor, input: Tensor, *sizes: Any, **kwargs: Any
) -> Iterator[tuple[Tensor, LinearMap]]:
    if (made := _constant(input, output)) is not None:
        yield input, made


def _constant(term: Tensor, output: Tensor, scale: float = 1) -> LinearMap | None:
    """Return the dependence of ``x + scale w`` on each entry of w."""
    return _entrywise(term, output, lambda: output.detach().new_full((), scale))


def _affine(
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Callable[[], Tensor],
    *,
    by_channel: bool = True,
) -> Iterator[tuple[Tensor, LinearMap]]:
    """Yield the dependence of ``w * xhat + b`` on w and b, with the channels along the axis 1."""
    ones = (1,) * (output.dim() - 2) if by_channel else ()
    for parameter, values in ((weight, normalised), (bias, lambda: output.detach().new_ones(()))):
        if parameter is not None:
            made = _entrywise(parameter.detach().reshape(*parameter.shape, *ones), output, values)
            if made is not None:
                yield parameter, made


def _layer_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[tuple[Tensor, LinearMap]]:
    def normalised() -> Tensor:
        return F.layer_norm(input.detach(), normalized_shape, None, None, eps)

    return _affine(output, weight, bias, normalised, by_channel=False)


def _rms_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterator[tuple[Tensor, LinearMap]]:
    def normalised() -> Tensor:
        return F.rms_norm(input.detach(), normalized_shape, None, eps)

    return _affine(output, weight, None, normalised, by_channel=False)


def _group_norm(
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[tuple[Tensor, LinearMap]]:
    def normalised() -> Tensor:
        return F.group_norm(input.detach(), num_groups, None, None, eps)

    return _affine(output, weight, bias, normalised)


def _with_statistics(normalise: Any) -> FactorRule:
    """Return the rule of batch or instance normalisation with these statistics."""

    def rule(
        output: Tensor,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Iterator[tuple[Tensor, LinearMap]]:
        def normalised() -> Tensor:
            statistics = running_mean, running_var
            return normalise(input.detach(), *statistics, None, None, *rest, **options)

        return _affine(output, weight, bias, normalised)

    return rule


def _prelu(output: Tensor, input: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, LinearMap]]:
    return _affine(output, weight, None, lambda: input.detach().clamp_max(0))


# Functions that add two tensors, or a tensor and a number.
SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)

_FACTOR_RULES: Mapping[Any, FactorRule] = {
    F.linear: _linear,
    F.bilinear: _bilinear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.mm, Tensor.mm), _mm),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul), _matmul),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed_convolution
    ),
    F.embedding: _lookup,
    F.embedding_bag: _bags,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product),
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _difference),
    Tensor.expand: _expanded,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _with_statistics(F.batch_norm),
    F.instance_norm: _with_statistics(F.instance_norm),
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), _prelu),
}
