"""Functions that are computed in another way have torch's values and derivatives."""

import copy
import gc
import itertools
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hessfunc as hf
from hessfunc.autograd import linear as linear_module
from hessfunc.autograd import matrices
from hessfunc.autograd.bilinear import affine
from hessfunc.autograd.convolution import Convolution
from hessfunc.autograd.functorch import linear_in_cotangents
from hessfunc.autograd.linear import Linear
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER


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


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr("hessfunc.autograd.elementwise._LARGE", 1)


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


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_torch(name, chunk_size):
    model, inputs, targets = made(name)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    block = hf.random_like(params, 3, kind="normal", seed=1)
    expected = plain_products(model, inputs, targets, block)
    for transform, reference in zip((hf.hvp, hf.ggnvp), expected, strict=True):
        matvec = transform(loss, chunk_size=chunk_size)(params, (inputs.clone(), targets))
        # Twice: what is kept from the first product serves the second.
        for _ in range(2):
            found = torch.cat([each.flatten(1) for each in matvec(block).values()], dim=1)
            torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["conv", "two convs", "conv, norm", "norm first", "layer norm"])
def test_products_with_a_part_of_the_parameters_are_those_of_torch(name):
    model, inputs, targets = made(name)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    whole = hf.hvp(loss)(params, (inputs, targets))
    for chosen in params:
        part, rest = hf.split(params, [chosen])
        vector = hf.random_like(part, 3, kind="normal", seed=1)
        zeros = {n: torch.zeros(3, *p.shape, dtype=p.dtype) for n, p in params.items()}
        expected = whole(zeros | vector)[chosen]
        held = hf.hold(loss, rest)
        for chunk_size in (1, 3):
            found = hf.hvp(held, chunk_size=chunk_size)(part, (inputs, targets))(vector)
            torch.testing.assert_close(found[chosen], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_torch(name):
    model, inputs, _ = made(name, torch.float32)
    expected = model(inputs.clone())
    with Replaced(SECOND_ORDER):
        found = model(inputs.clone())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv, norm", "layer norm", "gelu", "silu", "sigmoid", "tanh"])
def test_derivatives_of_the_third_order_are_those_of_torch(name):
    model, inputs, _ = made(name)
    leaves = list(model.parameters())

    def third(model):
        x = inputs.clone().requires_grad_()
        y = model(x).square().sum()
        for _ in range(2):
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            y = slope.square().sum()
        return torch.autograd.grad(y, leaves, allow_unused=True, materialize_grads=True)

    # The fused layer norm's own is wrong by half in torch 2.13.
    with Replaced({F.layer_norm: by_definition}):
        expected = third(model)
    with Replaced(SECOND_ORDER):
        found = third(model)
    for each, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(each, reference, rtol=1e-9, atol=1e-10)


def by_definition(x, shape, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * scale * weight + bias


def test_a_norm_that_is_trained_sees_its_batch():
    model, inputs, targets = made("conv, norm")
    model.train()
    model_fn, params = hf.functional(copy.deepcopy(model))
    loss = hf.supervised(model_fn, F.mse_loss)
    block = hf.random_like(params, 2, kind="normal", seed=1)
    expected, _ = plain_products(model, inputs, targets, block)
    found = hf.hvp(loss)(params, (inputs, targets))(block)
    found = torch.cat([each.flatten(1) for each in found.values()], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_signs_of_activations_are_those_of_torch():
    # The folded norm would round the inputs of a ReLU another way, and flip some that are near 0.
    (conv, norm, _), _, _ = made("conv, norm", torch.float32)
    inputs = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with Replaced(SECOND_ORDER):
        between = conv(inputs)
        ours = norm(between)
    torch.testing.assert_close(between, conv(inputs), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ours, norm(between))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_are_laid_out_as_torch_does(layout):
    model, _, _ = made("two convs", torch.float32)
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = inputs.contiguous(memory_format=layout)
    with Replaced(SECOND_ORDER):
        found = model(inputs)
    assert found.stride() == model(inputs).stride()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
class TestLinear:
    """In float32 and with sizes for which oneDNN is called."""

    @pytest.mark.parametrize(("vendor", "ours"), [("GenuineIntel", False), ("AuthenticAMD", True)])
    def test_the_vendor_of_the_processor_decides(self, vendor, ours, monkeypatch):
        monkeypatch.setattr(matrices, "_vendor", lambda: vendor)
        monkeypatch.setattr(matrices, "_has_both_libraries", lambda: True)
        x = torch.ones(1)
        assert matrices.has_faster(x) == ours
        assert not matrices.has_faster(x.double())
        with matrices.torchs_own():
            assert not matrices.has_faster(x)

    def operands(self, *shapes):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for shape in shapes]

    @pytest.mark.parametrize("which", range(3))
    def test_each_face_takes_a_block(self, which):
        x, w, g = self.operands((6, 5), (4, 5), (6, 4))
        form = Linear()
        faces = [
            (form.out, x, w, lambda x, w: x @ w.mT),
            (form.left, g, w, lambda g, w: g @ w),
            (form.right, g, x, lambda g, x: g.mT @ x),
        ]
        face, a, b, reference = faces[which]
        blocks = self.operands((3, *a.shape), (3, *b.shape))
        for left, right in ((a, b), (blocks[0], b), (a, blocks[1])):
            torch.testing.assert_close(face(left, right), reference(left, right))

    @pytest.mark.parametrize("chunk_size", [1, 2])
    @pytest.mark.parametrize("shape", [(300, 64), (5, 60, 64)])
    def test_products_are_those_of_torch(self, monkeypatch, chunk_size, shape):
        called = []
        monkeypatch.setattr(linear_module, "has_faster", lambda x: called.append(1) is None)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        inputs, *blocks = self.operands(shape, *[(2, *p.shape) for p in model.parameters()])
        for parameter, block in zip(model.parameters(), blocks, strict=True):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
            block.mul_(0.5)
        targets = torch.zeros(shape)
        names = [name for name, _ in model.named_parameters()]
        block = dict(zip(names, blocks, strict=True))
        expected = plain_products(
            copy.deepcopy(model).double(),
            inputs.double(),
            targets.double(),
            {name: leaf.double() for name, leaf in block.items()},
        )
        model_fn, params = hf.functional(model)
        loss = hf.supervised(model_fn, F.mse_loss)
        for transform, reference in zip((hf.hvp, hf.ggnvp), expected, strict=True):
            matvec = transform(loss, chunk_size=chunk_size)(params, (inputs, targets))
            found = torch.cat([each.flatten(1) for each in matvec(block).values()], dim=1)
            error = torch.linalg.vector_norm(found - reference) / reference.norm()
            assert error < 2e-6
        assert called


@pytest.mark.parametrize("groups", [1, 2])
def test_each_face_of_a_convolution_takes_a_block(groups):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 7, dtype=torch.float64, generator=generator)
    w = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64, generator=generator)
    form = Convolution((2, 1), (1, 0), (1, 2), groups, x.shape, w.shape)
    g = torch.randn(form.out(x, w).shape, dtype=torch.float64, generator=generator)
    for face, a, b in ((form.out, x, w), (form.left, g, w), (form.right, g, x)):
        blocks = [torch.stack([t, 2 * t, -t]) for t in (a, b)]
        single = face(a, b)
        expected = torch.stack([single, 2 * single, -single])
        torch.testing.assert_close(face(blocks[0], b), expected)
        torch.testing.assert_close(face(a, blocks[1]), expected)
    # One number, seen from three sides.
    inner = (g * form.out(x, w)).sum()
    torch.testing.assert_close((x * form.left(g, w)).sum(), inner)
    torch.testing.assert_close((w * form.right(g, x)).sum(), inner)


def test_a_graph_for_gauss_newton_products_holds_no_second_derivative():
    w = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    g = torch.ones(6, 4, requires_grad=True)
    for surroundings, differentiable in ((nullcontext, True), (linear_in_cotangents, False)):
        y = affine(Linear(), x, w, None)
        with surroundings():
            (slope,) = torch.autograd.grad(y, x, g, create_graph=True)
        (of_w,) = torch.autograd.grad(slope.sum(), w, allow_unused=True)
        assert (of_w is not None) == differentiable


def test_functions_that_torch_func_transforms_are_left_to_torch():
    model, inputs, targets = made("conv, norm")
    names, leaves = zip(*model.named_parameters(), strict=True)

    def loss(*found):
        out = functional_call(model, dict(zip(names, found, strict=True)), (inputs,))
        return F.mse_loss(out, targets)

    everywhere = tuple(range(len(leaves)))
    expected = torch.func.grad(loss, everywhere)(*leaves)
    with Replaced(SECOND_ORDER):
        found = torch.func.grad(loss, everywhere)(*leaves)
    for each, reference in itertools.zip_longest(found, expected):
        torch.testing.assert_close(each, reference)


@pytest.mark.parametrize("name", ["conv, norm", "norm of rows", "gelu"])
def test_autocast_is_left_to_torch(name):
    model, inputs, _ = made(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(inputs.clone())
        with Replaced(SECOND_ORDER):
            found = model(inputs.clone())
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


# Losses that do more than call a module


def products(loss, params, batch, transform=hf.hvp, chunk_size=1):
    block = hf.random_like(params, 2, kind="normal", seed=1)
    found = transform(loss, chunk_size=chunk_size)(params, batch)(block)
    return torch.cat([leaf.flatten(1) for leaf in found.values()], dim=1)


def torch_alone(monkeypatch):
    """Products without any replaced function."""
    for module in ("hessian", "gauss_newton"):
        monkeypatch.setattr(f"hessfunc.transforms.{module}.SECOND_ORDER", {})


def assert_same_as_torch_alone(monkeypatch, loss, params, batch, transforms=(hf.hvp, hf.ggnvp)):
    found = [products(loss, params, batch, t, k) for t in transforms for k in (1, 2)]
    with monkeypatch.context() as alone:
        torch_alone(alone)
        expected = [products(loss, params, batch, t) for t in transforms for _ in (1, 2)]
    for each, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(each, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda y, t: (torch.sigmoid(y) - t).square().mean(),
        lambda y, t: F.layer_norm(y, y.shape[-1:]).sub(t).square().mean(),
        lambda y, t: F.gelu(y).sub(t).pow(4).mean(),
        lambda y, t: F.linear(y.flatten(1), torch.ones(2, y[0].numel()).to(y)).tanh().sum(),
    ],
    ids=["sigmoid", "layer norm", "gelu", "linear"],
)
@pytest.mark.filterwarnings("ignore:the criterion is not convex")
def test_a_criterion_may_be_curved_by_any_of_them(monkeypatch, criterion):
    model, inputs, targets = made("two convs")
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, criterion)
    assert_same_as_torch_alone(monkeypatch, loss, params, (inputs, targets))


def slope_net():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    x = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    return *hf.functional(model), x


@pytest.mark.parametrize("order", [1, 2])
def test_a_loss_may_take_derivatives_by_its_inputs(monkeypatch, order):
    model_fn, params, x = slope_net()

    def outputs(params, x):
        x = x.detach().requires_grad_()
        u = model_fn(params, x)
        for _ in range(order):
            (u,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
        return u

    loss = hf.composed(outputs, lambda u, _: u.square().mean())
    # The fused layer norm's own third derivative is wrong in torch 2.13.
    monkeypatch.setattr(F, "layer_norm", by_definition)
    assert_same_as_torch_alone(monkeypatch, loss, params, x)


def test_a_loss_may_take_a_block_of_derivatives(monkeypatch):
    model_fn, params, x = slope_net()

    def outputs(params, x):
        x = x.detach().requires_grad_()
        u = model_fn(params, x)
        eye = torch.eye(2, dtype=u.dtype)[:, None].expand(2, *u.shape)
        (slopes,) = torch.autograd.grad(u, x, eye, create_graph=True, is_grads_batched=True)
        return slopes

    loss = hf.composed(outputs, lambda u, _: u.square().mean())
    monkeypatch.setattr(F, "layer_norm", by_definition)
    assert_same_as_torch_alone(monkeypatch, loss, params, x)


def test_a_checkpointed_region_is_left_to_torch(monkeypatch):
    weights = {"w": torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()}
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()

    def outputs(params, x):
        return checkpoint(lambda h: torch.tanh(h @ params["w"]), x, use_reentrant=False)

    loss = hf.composed(outputs, lambda u, _: u.square().mean())
    assert_same_as_torch_alone(monkeypatch, loss, weights, x)


def conv_norm():
    model, inputs, _ = made("conv, norm")
    return *model, inputs


FORBIDDING = {
    "no_grad": lambda conv, x: torch.no_grad()(conv)(x),
    "detach": lambda conv, x: conv(x).detach(),
    "detach in place": lambda conv, x: conv(x).detach_(),
}


@pytest.mark.parametrize("name", FORBIDDING)
def test_a_norm_does_not_reach_past_what_ends_the_graph(name):
    conv, norm, _, x = conv_norm()
    with Replaced(SECOND_ORDER):
        out = norm(FORBIDDING[name](conv, x)).square().sum()
    (found,) = torch.autograd.grad(out, conv.weight, allow_unused=True)
    assert found is None


def test_a_hook_between_convolution_and_norm_is_heard():
    conv, norm, _, x = conv_norm()
    slopes = []
    for table in (SECOND_ORDER, {}):
        with Replaced(table):
            y = conv(x)
            y.register_hook(lambda g: 3 * g)
            slopes.append(torch.autograd.grad(norm(y).square().sum(), conv.weight)[0])
    torch.testing.assert_close(*slopes)


def test_what_changes_in_place_before_the_norm_is_not_made_one_with_it():
    conv, norm, _, x = conv_norm()
    x = x.clone()
    with Replaced(SECOND_ORDER):
        y = conv(x)
        x.mul_(3.0)
        out = norm(y).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, conv.weight)


def test_complex_activations_are_left_to_torch():
    z = torch.randn(4, 4, dtype=torch.complex128, requires_grad=True)
    with Replaced(SECOND_ORDER):
        out = torch.tanh(z)
    assert "Tanh" in out.grad_fn.name()


def test_calls_of_every_form_are_taken():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    w, b = torch.randn(4, 3, 3, 3), torch.randn(4)
    out = torch.empty(2, 3, 8, 8)
    with Replaced(SECOND_ORDER), torch.no_grad():
        assert torch.sigmoid(x.detach(), out=out) is out
    with Replaced(SECOND_ORDER):
        torch.testing.assert_close(F.conv2d(x, w, b, np.int64(2)), F.conv2d(x, w, b, 2))
        assert F.linear(torch.randn(2, 3), torch.randn(4, 3), torch.randn(2, 4)).shape == (2, 4)
        with pytest.raises(RuntimeError, match="approximate"):
            F.gelu(x, approximate="none at all")
        with torch.inference_mode():
            assert F.conv2d(x, w).shape == (2, 4, 6, 6)
        with fwAD.dual_level():
            dual = fwAD.make_dual(x.detach(), torch.ones_like(x))
            assert fwAD.unpack_dual(torch.tanh(F.conv2d(dual, w))).tangent is not None


def test_what_torch_lets_change_in_place_may_change():
    h = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    with Replaced(SECOND_ORDER):
        x = 2 * h
        y = torch.tanh(x)
        x.add_(1.0)
        torch.autograd.grad(y.sum(), h)
        z = F.layer_norm(2 * h, (4,))
        z.mul_(2.0)
        torch.autograd.grad(z.square().sum(), h)


@pytest.mark.parametrize("name", ["layer norm", "layer norm without weight", "gelu", "tanh"])
@pytest.mark.parametrize("transform", [hf.hvp, hf.ggnvp])
def test_a_matvec_that_is_dropped_leaves_nothing(name, transform):
    model, inputs, targets = made(name)
    model_fn, params = hf.functional(model)
    seen = []

    class Mark:
        pass

    def outputs(params, x):
        out = model_fn(params, x)
        mark = out.grad_fn.metadata["mark"] = Mark()
        seen.append(weakref.ref(mark))
        return out

    loss = hf.supervised(outputs, F.mse_loss)
    matvec = transform(loss)(params, (inputs, targets))
    matvec(hf.random_like(params, 2, seed=0))
    assert seen[0]() is not None
    del matvec
    gc.collect()
    assert seen[0]() is None


def test_one_leaf_of_a_vector_may_be_mapped_over():
    model, inputs, targets = made("two convs")
    model_fn, params = hf.functional(model)
    matvec = hf.hvp(hf.supervised(model_fn, F.mse_loss), chunk_size=1)(params, (inputs, targets))
    vector = {name: leaf[0] for name, leaf in hf.random_like(params, 1, seed=0).items()}
    name = list(params)[-2]
    block = hf.random_like({name: params[name]}, 3, kind="normal", seed=1)[name]
    found = torch.vmap(lambda leaf: hf.apply(matvec, {**vector, name: leaf}))(block)
    for i, leaf in enumerate(block):
        expected = hf.apply(matvec, {**vector, name: leaf})
        for key in params:
            torch.testing.assert_close(found[key][i], expected[key])
