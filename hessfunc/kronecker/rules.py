"""One rule a module type: a call on a batch -> its derivatives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.kronecker.jacobians import Diagonal, EachExample, Identity, OfAll, Selection
from hessfunc.kronecker.layer import Call, Dependence, General, Layer, SharedWeight

Rule: TypeAlias = Callable[[Call], Layer]
AnyRule = TypeVar("AnyRule", bound=Rule)

_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[AnyRule], AnyRule]:
    """Register a rule for module types, for functions, or for names of tensor methods.

        @rule(Swish)
        def swish(call):
            return elementwise(call)

    or, shorter, ``rule(Swish)(elementwise)``. Ready to use are `elementwise`, `piecewise_linear`,
    `linear`, `selection`, and `by_autodiff`, which fits any module that treats each example by
    itself. A module whose type has a rule is one step of the backpropagation; one without is
    looked into. A subclass that acts as its base takes the base's rule:
    ``rule(MyLinear)(rule_of(torch.nn.Linear))``.

    Args:
        targets: ``nn.Module`` types (not their subclasses), functions, strings.
    """

    def register(found: AnyRule) -> AnyRule:
        _RULES.update(dict.fromkeys(targets, found))
        return found

    return register


def rule_of(target: Any, /) -> Rule | None:
    """The rule of a module type, a function, or the name of a tensor method."""
    return _RULES.get(target)


@rule(
    *(nn.Flatten, nn.Unflatten, nn.Identity, torch.flatten, torch.reshape, torch.squeeze),
    *(torch.unsqueeze, "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "float", "double"),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.FeatureAlphaDropout, F.dropout),
)
def reshaped(call: Call, /) -> Layer:
    """The same numbers, maybe in another shape; dropout in eval mode is one."""
    if call.shape.numel() != call.inputs[0][0].numel():
        raise NotImplementedError(
            f"an example's shape changes from {tuple(call.inputs[0].shape[1:])} to "
            f"{tuple(call.shape)}, so these are not the same numbers in another shape"
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
def linear(call: Call, /) -> Layer:
    """A function that is linear, up to a constant, and the same for all examples."""
    width = max(shape.numel() for shape in (call.shape, *(t.shape[1:] for t in call.inputs)))

    def adjoint(cotangents: Tensor) -> Sequence[Tensor]:
        zeros = [t.new_zeros(len(cotangents), *t.shape[1:]) for t in call.inputs]
        found = torch.func.vjp(call, *zeros)[1](cotangents)
        return [found[i] for i in call.moving]

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
def elementwise(call: Call, /) -> Layer:
    """A function of each entry alone: J = diag(phi'), and its curvature is diag(sum_b phi'' g).

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
def piecewise_linear(call: Call, /) -> Layer:
    """An elementwise function whose second derivative is zero; phi' is 0 or as torch takes it."""
    return Layer(Diagonal(_slopes(call, twice=False)[0]))


def _slopes(call: Call, *, twice: bool) -> tuple[Tensor, Tensor | None]:
    """phi' and phi'' at each entry ``(B, n)``; None for a phi'' that is zero."""
    if len(call.moving) != 1:
        raise NotImplementedError(
            "a product or quotient of two tensors that both depend on parameters is no function "
            "of each entry of one"
        )
    inputs, (place,) = list(call.inputs), call.moving
    with torch.enable_grad():
        x = inputs[place] = inputs[place].detach().requires_grad_()
        y = call(*inputs)
        if y.shape != x.shape:
            raise NotImplementedError(
                f"inputs of shape {tuple(x.shape)} are broadcast to {tuple(y.shape)}, which is no "
                "function of each entry alone"
            )
        (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=twice)
        second = None
        if twice and first.requires_grad:
            (second,) = torch.autograd.grad(first, x, torch.ones_like(first), allow_unused=True)
    return _flat(first.detach()), None if second is None else _flat(second)


def _flat(batch: Tensor) -> Tensor:
    """One row an example."""
    return batch.reshape(len(batch), -1)


@rule(
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
)
def selection(call: Call, /) -> Layer:
    """A function each of whose outputs is one of the inputs."""
    (inputs,) = call.inputs
    n = inputs[0].numel()
    with torch.enable_grad():
        x = inputs.detach().double().requires_grad_()
        y = call(x)
        # J c, with c the numbers of the inputs, is the number of the input that each output is.
        cotangent = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        numbers = torch.arange(n, dtype=x.dtype, device=x.device).expand(len(x), -1)
        (found,) = torch.autograd.grad(pulled, cotangent, numbers.reshape(x.shape))
    return Layer(Selection(_flat(found.round().long()), n))


@rule(nn.Linear)
def affine(call: Call, /) -> Layer:
    """``z = W x + b`` at each position: J = W, H_W = H (x) xx'."""
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
    """J is the convolution, H_W goes through the unfolded input."""
    module = call.module
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return Layer(
        linear(call).jacobian,
        parameters=_shared(call, partial(unfolded, module), groups=module.groups),
    )


def unfolded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """What each weight of a convolution meets at each position, ``(B, groups, K, P)``."""
    dims = len(module.kernel_size)
    if module.padding != "valid":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    for axis, (size, dilation, stride) in enumerate(
        zip(module.kernel_size, module.dilation, module.stride, strict=True)
    ):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (B, C, *positions, *kernel) -> (B, C, *kernel, *positions)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    kernel = torch.Size(module.kernel_size).numel()
    fan_in = module.in_channels // module.groups * kernel
    return x.reshape(len(x), module.groups, fan_in, -1)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(call: Call, /) -> Layer:
    """An affine map of each channel, in eval mode."""
    module, (inputs,) = call.module, call.inputs
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
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
    """``max(0, x) + w min(0, x)``, with one w or one a channel."""
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
    """The dependence on ``weight`` and on ``bias``, which is a weight of inputs that are one."""

    def ones(x: Tensor) -> Tensor:
        return x.new_ones(1, 1, 1, call.shape.numel() // len(call.params["bias"]))

    (inputs,) = call.inputs
    found: dict[str, Dependence] = {}
    if "weight" in call.params:
        shape = call.params["weight"].shape
        found["weight"] = SharedWeight(weight, inputs, shape, groups, **options)
    if "bias" in call.params:
        found["bias"] = SharedWeight(ones, inputs, call.params["bias"].shape, **options)
    return found


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
def by_autodiff(call: Call, /) -> Layer:
    """Any twice differentiable function that treats each example by itself.

    Its Jacobians ``(B, m, n)`` are formed by autodiff, with respect to the input and to each
    parameter.
    """
    if len(call.inputs) != 1:
        raise NotImplementedError(f"by_autodiff takes one input, and there are {len(call.inputs)}")
    (inputs,) = call.inputs

    def flat(leaf: str | None) -> Callable[[Tensor, Tensor], Tensor]:
        """One example's flat output, a function of the input or of a parameter, also flat."""

        def function(value: Tensor, example: Tensor) -> Tensor:
            x = (value if leaf is None else example).view(1, *inputs.shape[1:])
            own = {} if leaf is None else {leaf: value.view(call.params[leaf].shape)}
            return call.function({**call.params, **own}, x).flatten()

        return function

    def jacobians(leaf: str | None, at: Tensor) -> Tensor:
        function = torch.func.jacrev(flat(leaf))
        return torch.func.vmap(function, in_dims=(0 if leaf is None else None, 0))(at, examples)

    def curvature(leaf: str | None, at: Tensor) -> Callable[[Tensor], Tensor]:
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
