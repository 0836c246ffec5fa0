"""The face of HessianFlow beside dense Hessians, and beside HessianFlow's loops, written out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.compat import hessianflow
from tests import reference
from tests.compat.hessianflow.problem import (
    Batch,
    batches,
    criterion,
    dense,
    dominant,
    net,
    normalised,
    sgd,
)


def hessianflow_eigen(
    model: nn.Module, data: Sequence[Batch], steps: int, tol: float
) -> tuple[float, list[Tensor]]:
    """HessianFlow's power iteration, over batches of one size."""
    params = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)
    vector /= vector.norm()
    value = None
    for _ in range(steps):
        image = torch.zeros_like(vector)
        for inputs, targets in data:
            loss = criterion(model(inputs), targets)
            gradient = torch.autograd.grad(loss, params, create_graph=True)
            inner = reference.flat(gradient) @ vector
            image += reference.flat(torch.autograd.grad(inner, params)) / len(data)
        new = float(image @ vector)
        vector = image / image.norm()
        if value is not None and abs(new - value) / abs(value) < tol:
            value = new
            break
        value = new
    assert value is not None
    return value, list(vector.split([p.numel() for p in params]))


def test_the_eigenvalue_is_that_of_the_dense_hessian() -> None:
    model, data = net(), batches(30)
    value, vector = hessianflow.get_eigen(model, *data[0], criterion, cuda=False, tol=1e-6)
    assert isinstance(value, float)
    assert value == pytest.approx(dominant(model, data), rel=1e-10)
    assert [v.shape for v in vector] == [p.shape for p in model.parameters()]
    flat = reference.flat(vector)
    assert float(flat.norm()) == pytest.approx(1)
    assert float((dense(model, data) @ flat - value * flat).norm()) <= 1e-6 * value


def test_a_dominant_eigenvalue_may_be_negative() -> None:
    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(outputs, targets)

    model, data = net(), batches(30)
    value, _ = hessianflow.get_eigen(model, *data[0], concave, tol=1e-6)
    assert value == pytest.approx(-dominant(model, data), rel=1e-10)


def test_where_hessianflow_converges_it_finds_the_same() -> None:
    model, data = net(), batches(20, 20, 20)
    theirs, their_vector = hessianflow_eigen(model, data, 2000, 1e-12)
    ours, vector = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    assert ours == pytest.approx(theirs, rel=1e-6)
    cosine = reference.flat(vector) @ reference.flat(their_vector)
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_with_the_settings_of_the_scripts_it_is_no_farther_from_the_truth() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model, data = net(), batches(20, seed=seed)
        truth = dominant(model, data)
        theirs, _ = hessianflow_eigen(model, data, 10, 1e-2)
        ours, _ = hessianflow.get_eigen(model, *data[0], criterion, maxIter=10, tol=1e-2)
        assert abs(ours - truth) <= 1e-2 * abs(truth)
        assert abs(ours - truth) <= abs(theirs - truth) + 1e-9


def test_every_example_of_a_data_set_counts() -> None:
    model, data = net(), batches(16, 16, 7)
    value, _ = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    assert value == pytest.approx(dominant(model, data), rel=1e-10)
    skipped, _ = hessianflow_eigen(model, data[:2], 2000, 1e-12)
    assert value != pytest.approx(skipped, rel=1e-3)


def test_a_loader_that_shuffles() -> None:
    model, data = net(), batches(39)
    loader = DataLoader(TensorDataset(*data[0]), 16, shuffle=True)
    state = torch.get_rng_state()
    value, _ = hessianflow.get_eigen_full_dataset(model, loader, criterion, tol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert value == pytest.approx(dominant(model, data), rel=1e-8)
    with pytest.raises(ValueError, match="can be read only once"):
        hessianflow.get_eigen_full_dataset(model, iter(data), criterion)


def test_the_model_stays_as_it_was() -> None:
    model, data = normalised().train(), batches(30)
    before = copy.deepcopy(model.state_dict())
    value, _ = hessianflow.get_eigen(model, *data[0], criterion, tol=1e-6)
    # In eval mode, whatever the mode of the model.
    assert value == pytest.approx(dominant(model, data), rel=1e-10)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_data_parallel_frozen_and_unused_parameters() -> None:
    model, data = net(), batches(30)
    value, _ = hessianflow.get_eigen(model, *data[0], criterion)
    assert hessianflow.get_eigen(nn.DataParallel(model), *data[0], criterion)[0] == value
    model.register_parameter("unused", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    found, vector = hessianflow.get_eigen(model, *data[0], criterion, tol=1e-6)
    assert found == pytest.approx(dominant(model, data))
    unused = [n for n, _ in model.named_parameters()].index("unused")
    assert float(vector[unused].abs().max()) <= 1e-6
    model[1].requires_grad_(False)
    assert len(hessianflow.get_eigen(model, *data[0], criterion)[1]) == 3


def test_an_eigenvalue_that_has_not_converged_is_warned_of() -> None:
    model, data = net(), batches(30)
    for steps, expected in (
        (3, r"converged to tol=0.001: .* residual is (.*) \(.*budget.*increase maxIter"),
        # Lanczos makes two products at least.
        (1, "has not converged"),
    ):
        with pytest.warns(UserWarning, match=expected) as warned:
            value, vector = hessianflow.get_eigen(model, *data[0], criterion, maxIter=steps)
        with pytest.warns(UserWarning, match="has not converged"):
            hessianflow.get_eigen_full_dataset(model, data, criterion, maxIter=steps)
        assert warned[0].filename == __file__
        flat = reference.flat(vector)
        residual = float((dense(model, data) @ flat - value * flat).norm())
        assert f"residual is {residual:.1e}" in str(warned[0].message)


@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_the_start_is_a_function_of_torchs_seed() -> None:
    model, data = net(), batches(30)

    def few_products(seed: int) -> float:
        torch.manual_seed(seed)
        return hessianflow.get_eigen(model, *data[0], criterion, maxIter=3)[0]

    assert few_products(1) == few_products(1) != few_products(2)


@pytest.mark.gpu
def test_on_a_gpu_batches_come_from_the_cpu() -> None:
    model, data = net(), batches(8, 8)
    expected, _ = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    model.cuda()
    value, vector = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    assert value == pytest.approx(expected, rel=1e-8)
    assert vector[0].is_cuda
    hessianflow.baseline(model, data, data, criterion, sgd(model), 1, [], 1.0)
    hessianflow.absa(
        *(model, data, data, data, criterion, sgd(model), 2, [], 1.0),
        adv_ratio=0.2,
        eps=0.01,
        max_large_ratio=2,
    )
