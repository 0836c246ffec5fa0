"""Linear layers as bilinear maps, in float32 and with sizes for which oneDNN is called."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.autograd import linear as linear_module
from hessfunc.autograd.linear import Linear
from tests.autograd.layers import plain_products


def operands(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


ONE_DNN = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@ONE_DNN
@pytest.mark.parametrize("which", range(3))
def test_each_face_of_a_linear_layer_takes_a_block(which):
    x, w, g = operands((6, 5), (4, 5), (6, 4))
    form = Linear()
    faces = [
        (form.out, x, w, lambda x, w: x @ w.mT),
        (form.left, g, w, lambda g, w: g @ w),
        (form.right, g, x, lambda g, x: g.mT @ x),
    ]
    face, a, b, reference = faces[which]
    blocks = operands((3, *a.shape), (3, *b.shape))
    for left, right in ((a, b), (blocks[0], b), (a, blocks[1])):
        torch.testing.assert_close(face(left, right), reference(left, right))


@ONE_DNN
@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("shape", [(300, 64), (5, 60, 64)])
def test_products_of_linear_layers_are_those_of_torch(monkeypatch, chunk_size, shape):
    called = []
    monkeypatch.setattr(linear_module, "has_faster", lambda x: called.append(1) is None)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    inputs, *blocks = operands(shape, *[(2, *p.shape) for p in model.parameters()])
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
