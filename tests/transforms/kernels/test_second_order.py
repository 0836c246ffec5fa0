"""Functions that are computed in another way have torch's values and derivatives."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.memory import PeakMemory
from hessfunc.transforms.kernels import linear as linear_module
from hessfunc.transforms.kernels import matrices
from hessfunc.transforms.kernels.bilinear import affine
from hessfunc.transforms.kernels.convolution import Convolution
from hessfunc.transforms.kernels.linear import Linear
from hessfunc.transforms.kernels.replaced import Replaced
from hessfunc.transforms.kernels.second_order import replacements


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


class Viewed(nn.Module):
    """An image's features, as a `view` that needs torch's own layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.tanh(self.conv(x)).view(len(x), -1)


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
    "viewed": (Viewed, IMAGE),
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
    monkeypatch.setattr("hessfunc.transforms.kernels.elementwise._LARGE", 1)


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
    with Replaced(replacements(twice=True)):
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
    with Replaced(replacements(twice=True)):
        found = third(model)
    for each, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(each, reference, rtol=1e-9, atol=1e-10)


def by_definition(x, shape, weight, bias, eps):
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
    model, _, _ = made("conv, norm", torch.float32)
    inputs = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    by_torch = model[1](model[0](inputs.contiguous(memory_format=torch.channels_last)))
    with Replaced(replacements(twice=True)):
        ours = model[1](model[0](inputs))
    assert torch.equal(ours, by_torch)


def test_images_are_laid_out_with_their_channels_last():
    model, _, _ = made("two convs", torch.float32)
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with Replaced(replacements(twice=True)):
        assert model(inputs).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
class TestLinear:
    """In float32 and with sizes for which oneDNN is called."""

    def test_the_trial_of_libraries_is_not_seen_by_modes(self):
        matrices._one_dnn_is_faster.cache_clear()
        with PeakMemory() as memory:
            matrices.has_faster(torch.ones(1))
        assert memory.peak == 4

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
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    g = torch.ones(6, 4, requires_grad=True)
    for twice in (False, True):
        (slope,) = torch.autograd.grad(
            affine(Linear(), x.requires_grad_(), w, None, twice=twice), x, g, create_graph=True
        )
        (of_w,) = torch.autograd.grad(slope.sum(), w, allow_unused=True)
        assert (of_w is not None) == twice


def test_functions_that_torch_func_transforms_are_left_to_torch():
    model, inputs, targets = made("conv, norm")
    names, leaves = zip(*model.named_parameters(), strict=True)

    def loss(*found):
        out = functional_call(model, dict(zip(names, found, strict=True)), (inputs,))
        return F.mse_loss(out, targets)

    everywhere = tuple(range(len(leaves)))
    expected = torch.func.grad(loss, everywhere)(*leaves)
    with Replaced(replacements(twice=True)):
        found = torch.func.grad(loss, everywhere)(*leaves)
    for each, reference in itertools.zip_longest(found, expected):
        torch.testing.assert_close(each, reference)


@pytest.mark.parametrize("name", ["conv, norm", "norm of rows", "gelu"])
def test_autocast_is_left_to_torch(name):
    model, inputs, _ = made(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(inputs.clone())
        with Replaced(replacements(twice=True)):
            found = model(inputs.clone())
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
