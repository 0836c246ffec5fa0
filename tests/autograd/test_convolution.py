"""Convolutions as bilinear maps."""

import pytest
import torch

from hessfunc.autograd.convolution import Convolution
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from tests.autograd.layers import made


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_are_laid_out_as_torch_does(layout):
    model, _, _ = made("two convs", torch.float32)
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = inputs.contiguous(memory_format=layout)
    with Replaced(SECOND_ORDER):
        found = model(inputs)
    assert found.stride() == model(inputs).stride()


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
