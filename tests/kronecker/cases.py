"""Small nets in float64, one for each layer that has a rule, and what their blocks must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import Residual


@dataclass(frozen=True)
class Net:
    """A model with its loss, parameters and batch."""

    model: nn.Module
    loss: hf.Loss
    params: dict[str, Tensor]
    batch: tuple[Tensor, Tensor]


def net(
    make: Callable[[], nn.Module],
    *shape: int,
    examples: int = 1,
    criterion: Callable[[Any, Any], Tensor] = F.cross_entropy,
    seed: int = 0,
) -> Net:
    """A model of random weights, BatchNorm statistics and inputs ``(examples, *shape)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = torch.randn(examples, *shape, dtype=torch.float64)
        model = _with_head(make().double(), inputs).double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter)
        outputs = model(inputs).detach()
        if criterion is F.cross_entropy:
            targets = torch.randint(outputs.shape[1], (examples, *outputs.shape[2:]))
        else:
            targets = torch.rand_like(outputs)
    model_fn, params = hf.functional(model)
    return Net(model, hf.supervised(model_fn, criterion), params, (inputs, targets))


def dense(blocks: hf.kronecker.Blocks) -> dict[str, Tensor]:
    """The matrix of each block, from products with unit vectors."""
    return {
        name: block.matvec(torch.eye(block.n, dtype=torch.float64).view(-1, *block.shape)).flatten(
            1
        )
        for name, block in blocks.items()
    }


def largest_error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The largest error of a block, relative to its largest entry."""
    assert list(found) == list(exact)
    return max(
        float((found[name] - block).abs().max() / block.abs().max().clamp_min(1e-300))
        for name, block in exact.items()
    )


def gauss_newton_blocks(case: Net) -> dict[str, Tensor]:
    """The diagonal blocks of the Gauss-Newton matrix, from exact products."""
    blocks = {}
    for name, leaf in case.params.items():
        chosen, rest = hf.split(case.params, [name])
        units = torch.eye(leaf.numel(), dtype=torch.float64).view(-1, *leaf.shape)
        matvec = hf.ggnvp(hf.hold(case.loss, rest))(chosen, case.batch)
        blocks[name] = matvec({name: units})[name].flatten(1)
    return blocks


def between(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer and a sigmoid, so that its Hessian has all terms."""
    return lambda: nn.Sequential(layer(), nn.Sigmoid(), nn.Flatten(), _Head())


def before(layer: nn.Module, *, dims: int = 2) -> nn.Module:
    """A convolution, whose blocks then depend on the layer's rule, the layer, and a head."""
    return nn.Sequential(conv(dims), nn.Tanh(), layer, nn.Flatten(), _Head())


def conv(dims: int, **options: Any) -> nn.Module:
    return getattr(nn, f"Conv{dims}d")(2, 4, **{"kernel_size": 3, **options})


class _Head(nn.Module):
    """Stands for a linear layer of three outputs, until its width is known."""


def _with_head(model: nn.Module, inputs: Tensor) -> nn.Module:
    if not isinstance(model, nn.Sequential) or not isinstance(model[-1], _Head):
        return model
    body = model[:-1]
    return nn.Sequential(*body, nn.Linear(body.eval()(inputs).shape[1], 3))


class SquareRoot(nn.Module):
    """Functions in place of modules, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.inner(x))
        y += 0.5 * x
        z = torch.cat([torch.tanh(y[:, :3]), y[:, 3:].relu()], dim=1)
        return self.outer((z**2 + 1).sqrt())


class Branches(nn.Module):
    """Two branches of one tensor, and a skip around both of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.left = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4))
        self.right = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + torch.sin(self.left(x) - self.right(x)) + x)


class Sizes(nn.Module):
    """A hidden tensor whose shape is read, a mask, a buffer, a constant and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 3, 2)
        self.head = nn.Linear(9, 3)
        self.register_buffer("offset", torch.ones(5, 3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.stem(x)) * x[:, :1, 1:]
        y = abs(y + self.offset[:3]) + torch.tensor([0.1, 0.2, 0.3])
        if mask is not None:
            y = y * mask
        y = F.dropout(y.view(y.size(0), -1), training=self.training)
        return self.head(F.avg_pool1d(torch.sigmoid(y), 1).reshape(y.shape[0], -1))


class Downsampled(nn.Module):
    """A residual block with a convolution on its shortcut, as those of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(2, 3, 1, stride=2), nn.BatchNorm2d(3))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out += identity
        out = torch.tanh(self.relu(out))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))


ACTIVATIONS = [
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Sigmoid),
    *(nn.Tanh, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.LogSigmoid, nn.ELU, nn.CELU, nn.SELU),
    *(nn.Softsign, nn.Tanhshrink, nn.Hardswish, nn.PReLU, nn.RReLU),
]

LAYERS: dict[str, Net] = {
    "one layer": net(lambda: nn.Linear(4, 3), 4),
    "linear": net(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 4),
    "no bias": net(
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), 4
    ),
    "sequence": net(between(lambda: nn.Linear(3, 2)), 4, 3),
    "images, last": net(between(lambda: nn.Linear(3, 2)), 2, 3, 3),
    "conv1d": net(between(lambda: conv(1)), 2, 6),
    "conv2d": net(between(lambda: conv(2)), 2, 5, 5),
    "conv3d": net(between(lambda: conv(3, kernel_size=2)), 2, 3, 3, 3),
    "stride": net(between(lambda: conv(2, stride=(2, 1))), 2, 6, 4),
    "padding": net(between(lambda: conv(2, padding=(1, 2))), 2, 3, 4),
    "same": net(between(lambda: conv(2, padding="same")), 2, 3, 3),
    "valid": net(between(lambda: conv(2, padding="valid")), 2, 3, 3),
    "circular": net(between(lambda: conv(2, padding=1, padding_mode="circular")), 2, 3, 3),
    "reflect": net(between(lambda: conv(2, padding=1, padding_mode="reflect")), 2, 3, 3),
    "replicate": net(between(lambda: conv(2, padding=2, padding_mode="replicate")), 2, 3, 3),
    "dilation": net(between(lambda: conv(2, dilation=(2, 1))), 2, 6, 4),
    "groups": net(between(lambda: conv(2, groups=2)), 2, 5, 5),
    "all options": net(
        between(lambda: conv(2, groups=2, stride=2, padding=2, dilation=2)), 2, 4, 4
    ),
    "kernel larger": net(between(lambda: conv(1, kernel_size=5, padding=2)), 2, 3),
    "maxpool1d": net(lambda: before(nn.MaxPool1d(2), dims=1), 2, 6),
    "maxpool2d": net(lambda: before(nn.MaxPool2d(3, stride=1)), 2, 6, 6),
    "maxpool, all options": net(
        lambda: before(nn.MaxPool2d(3, 2, padding=1, dilation=1, ceil_mode=True)), 2, 5, 5
    ),
    "maxpool3d": net(lambda: before(nn.MaxPool3d(2), dims=3), 2, 4, 4, 4),
    "avgpool1d": net(lambda: before(nn.AvgPool1d(2), dims=1), 2, 6),
    "avgpool2d": net(lambda: before(nn.AvgPool2d(2, 1, padding=1)), 2, 5, 5),
    "avgpool3d": net(lambda: before(nn.AvgPool3d(2), dims=3), 2, 4, 4, 4),
    "adaptive average": net(lambda: before(nn.AdaptiveAvgPool2d(2)), 2, 5, 5),
    "adaptive maximum": net(lambda: before(nn.AdaptiveMaxPool2d((2, 1))), 2, 5, 5),
    "zero padding": net(lambda: before(nn.ZeroPad2d((1, 0, 2, 0))), 2, 4, 5),
    "constant padding": net(lambda: before(nn.ConstantPad1d(1, 2.0), dims=1), 2, 6),
    "reflection padding": net(lambda: before(nn.ReflectionPad2d(1)), 2, 4, 4),
    "replication padding": net(lambda: before(nn.ReplicationPad2d(1)), 2, 4, 4),
    "circular padding": net(lambda: before(nn.CircularPad2d(1)), 2, 4, 4),
    "upsample": net(lambda: before(nn.Upsample(scale_factor=2)), 2, 4, 4),
    "batchnorm1d": net(between(lambda: nn.BatchNorm1d(5)), 5),
    "batchnorm1d, sequence": net(between(lambda: nn.BatchNorm1d(2)), 2, 3),
    "batchnorm2d": net(lambda: before(nn.BatchNorm2d(4)), 2, 5, 5),
    "batchnorm, not affine": net(lambda: before(nn.BatchNorm2d(4, affine=False)), 2, 5, 5),
    "layernorm": net(between(lambda: nn.LayerNorm(3)), 2, 3),
    "groupnorm": net(lambda: before(nn.GroupNorm(2, 4)), 2, 5, 5),
    "softmax": net(lambda: before(nn.Softmax(dim=1)), 2, 5, 5),
    "dropout": net(lambda: before(nn.Dropout(0.5)), 2, 5, 5),
    "nested": net(
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()),
            nn.Unflatten(1, (3, 1)),
            nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(3, 3))),
        ),
        4,
    ),
    "residual": net(
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            Residual(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))),
            nn.Sigmoid(),
            Residual(nn.Sequential(nn.Linear(5, 5), nn.Sigmoid())),
            nn.Linear(5, 3),
        ),
        4,
    ),
    "residual convolutions": net(
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=1),
            Residual(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
        *(2, 4, 4),
    ),
    "branches": net(Branches, 3),
    "functions": net(SquareRoot, 6),
    "sizes, masks, constants": net(Sizes, 2, 4),
    "downsampled": net(Downsampled, 2, 4, 4),
    "same, circular": net(
        between(lambda: conv(2, padding="same", padding_mode="circular")), 2, 3, 3
    ),
    "conv1d, reflect": net(between(lambda: conv(1, padding=1, padding_mode="reflect")), 2, 4),
    "avgpool, options": net(
        lambda: before(nn.AvgPool2d(2, 2, padding=1, ceil_mode=True, count_include_pad=False)),
        *(2, 5, 5),
    ),
    "adaptive average 1d": net(lambda: before(nn.AdaptiveAvgPool1d(2), dims=1), 2, 6),
    "adaptive maximum 1d": net(lambda: before(nn.AdaptiveMaxPool1d(2), dims=1), 2, 6),
    "batchnorm3d": net(lambda: before(nn.BatchNorm3d(4), dims=3), 2, 4, 4, 4),
    "transposed": net(lambda: before(nn.ConvTranspose2d(4, 2, 2)), 2, 4, 4),
    "gated linear unit": net(lambda: before(nn.GLU(dim=1)), 2, 4, 4),
    "in place": net(
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3)
        ),
        4,
    ),
    **{
        activation.__name__: net(
            lambda activation=activation: nn.Sequential(
                nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)
            ),
            4,
        )
        for activation in ACTIVATIONS
    },
}


def eight_rows(examples: int = 1) -> object:
    return net(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)), 4, examples=examples
    )


STRUCTURED = {
    "hbp": hf.kronecker.hbp,
    "kfra": hf.kronecker.kfra,
    "kflr": hf.kronecker.kflr,
    "kfac": partial(hf.kronecker.kfac, seed=0),
    "ekfac": hf.kronecker.ekfac,
}


def traces_of(case: Net, **options) -> hf.kronecker.Blocks:
    """The blocks of `ekfac`, whose traces are those of the Gauss-Newton matrix."""
    made = hf.kronecker.ekfac(case.loss, case.model, **options)(case.params, case.batch)
    for name, block in gauss_newton_blocks(case).items():
        assert made[name].trace() == pytest.approx(float(block.trace()), rel=1e-9)
    return made
