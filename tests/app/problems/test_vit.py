from __future__ import annotations

import torch

import hessfunc as hf
from hessfunc.app.problems.vit import ViT

SMALL = {"size": 8, "width": 16, "layers": 1, "heads": 2}


def test_size() -> None:
    assert sum(p.numel() for p in ViT().parameters()) == 10_694_794


def test_every_patch_sees_every_other() -> None:
    net = ViT(**SMALL)
    images = torch.randn(1, 3, 8, 8, requires_grad=True)
    # The first patch, before the patches are averaged.
    tokens = net.patches(images).flatten(2).transpose(1, 2)
    (gradient,) = torch.autograd.grad(net.layers(tokens)[0, 0].sum(), images)
    assert (gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((0, 1, 4, 5)) > 0).all()


def test_its_hessian_is_that_of_its_gradient() -> None:
    model_fn, params = hf.functional(ViT(**SMALL).double())
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    vector = {name: torch.randn_like(p) for name, p in params.items()}
    found = hf.apply(hf.hvp(loss)(params, batch), vector)
    ahead, behind = (
        torch.func.grad(loss)({n: p + t * vector[n] for n, p in params.items()}, batch)
        for t in (1e-5, -1e-5)
    )
    for name, image in found.items():
        torch.testing.assert_close(image, (ahead[name] - behind[name]) / 2e-5, rtol=1e-5, atol=1e-8)
