"""A trained ResNet-20 on CIFAR-10, against SciPy over plain double backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import cifar10
from hessfunc.app.problems.resnet import load_weights, resnet
from hessfunc.spaces.of import space_of
from tests.datapath import data_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def trained() -> nn.Module:
    model = resnet(20)
    model.load_state_dict(load_weights(data_file("resnet20_cifar10/resnet20-12fca82f.th")))
    return model.eval()


def by_double_backward(model: nn.Module, x: Tensor, y: Tensor) -> LinearOperator:
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    gradient = torch.autograd.grad(cross_entropy(model(x), y), params, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(vector).to(params[0].dtype).flatten()
        parts = [
            v.view_as(p)
            for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True)
        ]
        found = torch.autograd.grad(gradient, params, parts, retain_graph=True)
        return torch.cat([part.flatten() for part in found]).double().numpy()

    return LinearOperator((sum(sizes),) * 2, matvec=product, dtype=np.float64)


def data_hessian(dtype: torch.dtype) -> tuple[hf.trees.Matvec, hf.trees.Tree]:
    data = cifar10(data_file("cifar10"))
    examples = (data.inputs[:3].to(dtype), data.targets[:3])
    model_fn, params = hf.functional(trained().to(dtype))
    loss = hf.supervised(model_fn, cross_entropy)
    return hf.hvp(loss, chunk_size=1)(params, examples), params


def test_float32_has_the_five_largest_eigenvalues_of_float64() -> None:
    single, double = (
        hf.lanczos(*data_hessian(dtype), k=5, which="LA", rtol=rtol, seed=0)
        for dtype, rtol in [(torch.float32, 1e-3), (torch.float64, 1e-4)]
    )
    assert single.converged.all()
    assert double.converged.all()
    torch.testing.assert_close(single.values, double.values, rtol=1e-3, atol=0)
    gram = space_of(tree_of(single)).ravel(single.vectors).double()
    assert float((gram @ gram.mT - torch.eye(5)).abs().max()) < 1e-5


def tree_of(pairs: hf.results.Eigenpairs) -> hf.trees.Tree:
    return {name: leaf[0] for name, leaf in pairs.vectors.items()}


def test_five_largest_eigenvalues_are_scipys() -> None:
    data = cifar10(data_file("cifar10"))
    examples = (data.inputs[:12], data.targets[:12])
    model = trained()
    model_fn, params = hf.functional(model)
    matvec = hf.over_batches(hf.hvp(hf.supervised(model_fn, cross_entropy)), keep=True)(
        params, hf.microbatches(examples, 6)
    )
    found = hf.lanczos(matvec, params, k=5, which="LA", rtol=1e-3, seed=0)
    expected = eigsh(by_double_backward(model, *examples), k=5, which="LA", tol=1e-4)[0]
    assert found.converged.all()
    np.testing.assert_allclose(found.values.numpy(), expected[::-1], rtol=1e-3)
