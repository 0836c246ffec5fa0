"""Rules of Hessian backpropagation, which map a call on a batch to its derivatives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.kronecker.convolutions import unfolded
from hessfunc.kronecker.jacobians import Diagonal, EachExample, Identity, OfAll, Selection
from hessfunc.kronecker.layer import Call, Dependence, General, Layer, SharedWeight, of_rule
from hessfunc.options import described, plain_callable, validated

Rule: TypeAlias = Callable[[Call], Layer]
AnyRule = TypeVar("AnyRule", bound=Rule)

_RULES: dict[Any, Rule] = {}


def _target(name: str, value: Any, /) -> Any:
    if isinstance(value, str) or (callable(value) and not isinstance(value, nn.Module)):
        return value
    raise TypeError(
        f"{name} must be a module type, a function or the name of a tensor method, not "
        f"{described(value)}: pass rule(torch.nn.Tanh), for instance"
    )


@validated(targets=_target)
def rule(*targets: Any) -> Callable[[AnyRule], AnyRule]:
    """Register a rule for module types, for functions, or for names of tensor methods.

        @rule(Swish)
        def swish(call):
            return elementwise(call)

    The short form is ``rule(Swish)(elementwise)``. Predefined rules are `elementwise`,
    `piecewise_linear`, `linear`, `selection`, and `by_autodiff`. The last one fits any module that
    treats each example independently. A module whose type has a rule is one step of the
    backpropagation; a module without a rule is traced into the calls that it makes. A subclass that
    computes the same function as its base can reuse the rule of the base:
    ``rule(MyLinear)(rule_of(torch.nn.Linear))``.

    Args:
        targets: ``nn.Module`` types (not their subclasses), functions, or names of tensor methods.

    Returns:
        A decorator that registers a rule, a function from `Call` to `Layer`, and returns it.

    Raises:
        TypeError: If a target is none of these, or if the rule is not a function.
    """

    def register(new: AnyRule) -> AnyRule:
        plain_callable("the rule", new)
        _RULES.update(dict.fromkeys(targets, new))
        return new

    return register


@validated(target=_target)
def rule_of(target: Any, /) -> Rule | None:
    """Return the rule of a module type, a function, or the name of a tensor method, or None."""
    return _RULES.get(target)


@rule(
    *(nn.Flatten, nn.Unflatten, nn.Identity, torch.flatten, torch.reshape, torch.squeeze),
    *(torch.unsqueeze, "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "float", "double"),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.FeatureAlphaDropout, F.dropout),
)
@validated(call=of_rule)
def reshaped(call: Call, /) -> Layer:
    """Rule for functions that only change the shape, such as dropout in eval mode: J = I."""
    if call.shape.numel() != call.inputs[0][0].numel():
        raise NotImplementedError(
            f"the shape of an example changes from {tuple(call.inputs[0].shape[1:])} to "
            f"{tuple(call.shape)}, so that the call is not a reshape"
        )
    return Layer(Identity())


@rule(
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, F.pad),
    *(nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, F.interpolate, F.pixel_shuffle),
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.neg),
    *(
        torch.add,
        torch.sub,
        torch.cat,
        torch.stack,
        torch.mean,
        torch.sum,
        torch.permute,
        torch.transpose,
    ),
    *("add", "sub", "neg", "mean", "sum", "permute", "transpose", "movedim"),
    *(torch.movedim, operator.getitem, torch.flip, "flip", torch.roll, "roll", "add_", "sub_"),
)
@validated(call=of_rule)
def linear(call: Call, /) -> Layer:
    """Rule for an affine function that is the same for all examples."""
    width = max(shape.numel() for shape in (call.shape, *(t.shape[1:] for t in call.inputs)))

    def adjoint(cotangents: Tensor) -> Sequence[Tensor]:
        # The Jacobian of an affine function is the same everywhere: take it at zero.
        zeros = [t.new_zeros(len(cotangents), *t.shape[1:]) for t in call.inputs]
        pulled = torch.func.vjp(call, *zeros)[1](cotangents)
        return [pulled[i] for i in call.moving]

    return Layer(OfAll(adjoint, call.shape, width))


@rule(
    *(nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.LogSigmoid, nn.ELU),
    *(nn.CELU, nn.SELU, nn.Softsign, nn.Tanhshrink, nn.Hardswish),
    *(F.sigmoid, F.tanh, F.gelu, F.silu, F.mish, F.softplus, F.logsigmoid, F.elu, F.celu),
    *(F.selu, F.softsign, F.tanhshrink, F.hardswish),
    *(torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sin, torch.cos, torch.square),
    *(torch.sqrt, torch.pow, torch.erf, operator.pow, operator.mul, operator.truediv, torch.mul),
    *("sigmoid", "tanh", "exp", "log", "sin", "cos", "square", "sqrt", "pow", "mul", "div"),
)
@validated(call=of_rule)
def elementwise(call: Call, /) -> Layer:
    """Rule for a function phi of each entry: J = diag(phi'), with curvature diag(sum_b phi'' g).

    Further inputs may be fixed, as in a product with a mask.
    """
    slopes, curvature = _slopes(call, twice=True)
    return Layer(Diagonal(slopes), None if curvature is None else lambda g: (curvature * g).sum(0))


@rule(
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardshrink),
    *(nn.Softshrink, nn.Threshold, F.relu, F.relu6, F.leaky_relu, F.hardtanh, F.hardsigmoid),
    *(F.hardshrink, F.softshrink, F.threshold, torch.relu, torch.relu_, torch.clamp, torch.abs),
    *(operator.abs, nn.RReLU, "relu", "relu_", "clamp", "abs"),
)
@validated(call=of_rule)
def piecewise_linear(call: Call, /) -> Layer:
    """Rule for an elementwise function with zero second derivative.

    At a kink, phi' is the derivative that PyTorch returns.
    """
    return Layer(Diagonal(_slopes(call, twice=False)[0]))


def _slopes(call: Call, *, twice: bool) -> tuple[Tensor, Tensor | None]:
    """Return phi' and phi'' at each entry, ``(B, n)``; None if phi'' is zero."""
    if len(call.moving) != 1:
        raise NotImplementedError(
            "a product or quotient of two tensors that both depend on parameters is not an "
            "elementwise function of one tensor"
        )
    inputs, (place,) = list(call.inputs), call.moving
    with torch.enable_grad():
        x = inputs[place] = inputs[place].detach().requires_grad_()
        y = call(*inputs)
        if y.shape != x.shape:
            raise NotImplementedError(
                f"inputs of shape {tuple(x.shape)} are broadcast to {tuple(y.shape)}, so that the "
                "call is not an elementwise function"
            )
        # phi acts entry by entry, so that the gradient of sum(phi(x)) is phi' at each entry.
        (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=twice)
        second = None
        if twice and first.requires_grad:
            (second,) = torch.autograd.grad(first, x, torch.ones_like(first), allow_unused=True)
    return _flat(first.detach()), None if second is None else _flat(second)


def _flat(batch: Tensor) -> Tensor:
    """Flatten each example to one row."""
    return batch.reshape(len(batch), -1)


@rule(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
)
@validated(call=of_rule)
def selection(call: Call, /) -> Layer:
    """Rule for a function each of whose outputs equals one of the inputs."""
    (inputs,) = call.inputs
    n = inputs[0].numel()
    with torch.enable_grad():
        x = inputs.detach().double().requires_grad_()
        y = call(x)
        # Row i of J is the unit vector of the chosen input, so that J (0, 1, ..., n - 1)' is its
        # index. J v is the derivative of the pullback w -> J' w in the direction v.
        cotangent = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        numbers = torch.arange(n, dtype=x.dtype, device=x.device).expand(len(x), -1)
        (chosen,) = torch.autograd.grad(pulled, cotangent, numbers.reshape(x.shape))
    return Layer(Selection(_flat(chosen.round().long()), n))


@rule(nn.Linear)
def affine(call: Call, /) -> Layer:
    """Rule for ``z = W x + b`` at each position: J = W and H_W = H_z (x) x x'."""
    (inputs,), weight = call.inputs, call.params["weight"]

    def adjoint(cotangents: Tensor) -> tuple[Tensor, ...]:
        return (cotangents @ weight,)

    def positions(x: Tensor) -> Tensor:
        return x.reshape(len(x), 1, -1, x.shape[-1]).mT

    return Layer(
        OfAll(adjoint, call.shape, max(inputs[0].numel(), call.shape.numel())),
        parameters=_shared(call, positions, channels_last=True, splits=True),
    )


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(call: Call, /) -> Layer:
    """Rule for a convolution: J is its linear part, and H_W = J_W' H_z J_W uses unfolded inputs."""
    module = call.module
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return Layer(
        linear(call).jacobian,
        parameters=_shared(call, partial(_unfolded, module), groups=module.groups),
    )


def _unfolded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    if module.padding != "valid":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    return unfolded(x, module.kernel_size, module.stride, module.dilation, module.groups)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(call: Call, /) -> Layer:
    """Rule for batch norm in eval mode, an affine map of each channel."""
    module, (inputs,) = call.module, call.inputs
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    # z = w (x - mean) / sqrt(var + eps) + b for each channel, with fixed mean and var.
    per_channel = (1, -1, *[1] * (inputs.dim() - 2))
    mean = module.running_mean.to(inputs).view(per_channel)
    scale = torch.rsqrt(module.running_var.to(inputs) + module.eps).view(per_channel)

    def normalised(x: Tensor) -> Tensor:
        return ((x - mean) * scale).reshape(len(x), x.shape[1], 1, -1)

    weight = call.params.get("weight")
    slope = scale if weight is None else scale * weight.view(per_channel)
    return Layer(
        Diagonal(slope.expand(1, *inputs.shape[1:]).flatten(1)),
        parameters=_shared(call, normalised, groups=inputs.shape[1]),
    )


@rule(nn.PReLU)
def prelu(call: Call, /) -> Layer:
    """Rule for ``max(0, x) + w min(0, x)``, with one w for all channels or one for each."""
    (inputs,), weight = call.inputs, call.params["weight"]
    return Layer(
        piecewise_linear(call).jacobian,
        parameters={
            "weight": SharedWeight(
                lambda x: x.clamp_max(0).reshape(len(x), len(weight), 1, -1),
                inputs,
                weight.shape,
                len(weight),
                is_affine=False,
            )
        },
    )


def _shared(
    call: Call, weight: Callable[[Tensor], Tensor], *, groups: int = 1, **options: Any
) -> dict[str, Dependence]:
    """Return the dependence on ``weight`` and on ``bias``, a weight whose inputs are all 1."""

    def ones(x: Tensor) -> Tensor:
        return x.new_ones(1, 1, 1, call.shape.numel() // len(call.params["bias"]))

    (inputs,) = call.inputs
    parameters: dict[str, Dependence] = {}
    if "weight" in call.params:
        shape = call.params["weight"].shape
        parameters["weight"] = SharedWeight(weight, inputs, shape, groups, **options)
    if "bias" in call.params:
        parameters["bias"] = SharedWeight(ones, inputs, call.params["bias"].shape, **options)
    return parameters


@rule(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
@rule(
    nn.InstanceNorm3d,
    nn.Softmax2d,
    nn.Softmax,
    nn.LogSoftmax,
    nn.Softmin,
    F.softmax,
    F.log_softmax,
    torch.softmax,
    nn.GLU,
)
@rule(nn.LocalResponseNorm, nn.LPPool1d, nn.LPPool2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
@rule(nn.ConvTranspose3d, F.layer_norm)
@validated(call=of_rule)
def by_autodiff(call: Call, /) -> Layer:
    """Rule for any twice differentiable function that treats each example independently.

    Automatic differentiation computes its Jacobians ``(B, m, n)`` with respect to the input and to
    each parameter.
    """
    if not call.inputs:
        raise NotImplementedError(
            "by_autodiff supports one input, but the call has only indices, which have no "
            "derivative: use `kflr` or `kfac`, which support embeddings"
        )
    if len(call.inputs) != 1:
        raise NotImplementedError(
            f"by_autodiff supports one input, but the call has {len(call.inputs)}: register "
            "another rule (`from hessfunc.kronecker import rule`)"
        )
    (inputs,) = call.inputs

    def flat(leaf: str | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the flat output of one example as a function of its flat input or parameter."""

        def function(value: Tensor, example: Tensor) -> Tensor:
            x = (value if leaf is None else example).view(1, *inputs.shape[1:])
            own = {} if leaf is None else {leaf: value.view(call.params[leaf].shape)}
            return call.function({**call.params, **own}, x).flatten()

        return function

    def jacobians(leaf: str | None, at: Tensor) -> Tensor:
        function = torch.func.jacrev(flat(leaf))
        return torch.func.vmap(function, in_dims=(0 if leaf is None else None, 0))(at, examples)

    def curvature(leaf: str | None, at: Tensor) -> Callable[[Tensor], Tensor]:
        # sum_k g_k Hess z_k is the Hessian of <g, z> at fixed g.
        def along(value: Tensor, example: Tensor, slope: Tensor) -> Tensor:
            return flat(leaf)(value, example) @ slope

        hessian = torch.func.jacrev(torch.func.grad(along))
        dims = (0 if leaf is None else None, 0, 0)
        return lambda g: torch.func.vmap(hessian, in_dims=dims)(at, examples, g).sum(0)

    examples = _flat(inputs)
    sizes = (len(inputs), call.shape.numel(), examples.shape[1])
    parameters: dict[str, Dependence] = {
        name: General(
            partial(jacobians, name, value.flatten()),
            len(inputs),
            curvature(name, value.flatten()),
            value.shape,
        )
        for name, value in call.params.items()
    }
    jacobian = EachExample(partial(jacobians, None, examples), sizes)
    return Layer(jacobian, curvature(None, examples), parameters)
