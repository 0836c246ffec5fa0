"""Layers whose second derivatives the library replaces, and products by torch alone."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import hessfunc as hf


class Residual(nn.Module):
    """A convolution whose output is read twice: by a norm, and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return torch.tanh(self.norm(y) + y)


class ChangedInPlace(nn.Module):
    """A convolution whose output changes before the norm sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        y.mul_(2.0)
        return self.norm(y).tanh()


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


IMAGE, LINE, VOLUME, ROWS = (5, 3, 7, 7), (5, 3, 9), (3, 2, 4, 4, 4), (6, 5)
MODELS = {
    "conv": (lambda: nn.Conv2d(3, 4, 3), IMAGE),
    "conv strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), IMAGE),
    "conv of even size": (lambda: nn.Conv2d(3, 4, (2, 3), stride=(2, 3), padding=(1, 0)), IMAGE),
    "conv dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2), IMAGE),
    "conv grouped": (lambda: nn.Conv2d(3, 6, 3, groups=3), IMAGE),
    "conv same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), IMAGE),
    "conv of circles": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv of one image": (lambda: nn.Conv2d(3, 4, 3), IMAGE[1:]),
    "conv in one dimension": (lambda: nn.Conv1d(3, 4, 3, stride=2), LINE),
    "conv in three dimensions": (lambda: nn.Conv3d(2, 3, 3, padding=1), VOLUME),
    "conv transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), IMAGE),
    "two convs": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)), IMAGE),
    "conv, norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()), IMAGE),
    "conv, norm, in place": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, affine=False),
            nn.SiLU(inplace=True),
        ),
        IMAGE,
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Tanh()), IMAGE),
    "norm of lines": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Sigmoid()),
        LINE,
    ),
    "norm of rows": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        ROWS,
    ),
    "norm without statistics": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh()
        ),
        ROWS,
    ),
    "conv read twice": (Residual, IMAGE),
    "conv changed in place": (ChangedInPlace, IMAGE),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), ROWS),
    "layer norm without weight": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False, eps=0.1), nn.Linear(4, 3)
        ),
        ROWS,
    ),
    "layer norm without bias": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 3)),
        ROWS,
    ),
    "layer norm of images": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 5, 5]), nn.Tanh()),
        IMAGE,
    ),
    "layer norm of sequences": (
        lambda: nn.Sequential(nn.Linear(9, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        LINE,
    ),
    **{
        name: (lambda map=map: nn.Sequential(nn.Linear(5, 4), map, nn.Linear(4, 3)), ROWS)
        for name, map in {
            "gelu": nn.GELU(),
            "gelu by tanh": nn.GELU(approximate="tanh"),
            "silu": nn.SiLU(),
            "silu in place": nn.SiLU(inplace=True),
            "tanh": nn.Tanh(),
            "sigmoid": nn.Sigmoid(),
        }.items()
    },
}


def made(name, dtype=torch.float64):
    build, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_statistics(build().to(dtype))
        inputs = torch.randn(shape, dtype=dtype)
        targets = torch.randn_like(model(inputs.clone()))
    return model, inputs, targets


def plain_products(model, inputs, targets, block):
    """Those of the Hessian and of the Gauss-Newton matrix of MSE, by torch's own derivatives."""
    names, leaves = zip(*model.named_parameters(), strict=True)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def outputs(*found):
        return functional_call(model, dict(zip(names, found, strict=True)), (inputs.clone(),))

    gradient = torch.autograd.grad(F.mse_loss(outputs(*leaves), targets), leaves, create_graph=True)
    hessian, gauss_newton = [], []
    for i in range(len(block[names[0]])):
        vector = [block[name][i] for name in names]
        found = torch.autograd.grad(
            gradient, leaves, vector, retain_graph=True, materialize_grads=True
        )
        hessian.append(torch.cat([each.flatten() for each in found]))
        _, moved = torch.autograd.functional.jvp(outputs, tuple(leaves), tuple(vector))
        pulled = torch.autograd.grad(outputs(*leaves), leaves, 2 * moved / moved.numel())
        gauss_newton.append(torch.cat([each.flatten() for each in pulled]))
    return torch.stack(hessian), torch.stack(gauss_newton)


def by_definition(x, shape, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * scale * weight + bias


def products(loss, params, batch, transform=hf.hvp, chunk_size=1):
    block = hf.random_like(params, 2, kind="normal", seed=1)
    found = transform(loss, chunk_size=chunk_size)(params, batch)(block)
    return torch.cat([leaf.flatten(1) for leaf in found.values()], dim=1)


def torch_alone(monkeypatch):
    """Products without any replaced function."""
    for module in ("hessian", "output_matrices"):
        monkeypatch.setattr(f"hessfunc.transforms.{module}.SECOND_ORDER", {})


def assert_same_as_torch_alone(monkeypatch, loss, params, batch, transforms=(hf.hvp, hf.ggnvp)):
    found = [products(loss, params, batch, t, k) for t in transforms for k in (1, 2)]
    with monkeypatch.context() as alone:
        torch_alone(alone)
        expected = [products(loss, params, batch, t) for t in transforms for _ in (1, 2)]
    for each, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(each, reference, rtol=1e-9, atol=1e-11)


def conv_norm():
    model, inputs, _ = made("conv, norm")
    return *model, inputs
