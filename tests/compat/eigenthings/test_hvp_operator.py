"""Hessians of a data set, or of one batch after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.compat.eigenthings import HVPOperator, compute_hessian_eigenthings
from tests.compat.eigenthings.problem import data, dense, loader, net
from tests.graphs import counted_graphs


@pytest.mark.parametrize("size", [50, 20])
@pytest.mark.parametrize("pieces", [2**16, 7])
def test_products_are_those_of_all_examples_however_they_are_cut(size: int, pieces: int) -> None:
    model = net()
    found = HVPOperator(
        model, loader(size), cross_entropy, use_gpu=False, max_possible_gpu_samples=pieces
    )
    expected = dense(model, data())
    assert found.size == len(expected)
    for vector in torch.eye(found.size, dtype=torch.float64)[::9]:
        torch.testing.assert_close(found.apply(vector), expected @ vector)


def test_a_piece_is_as_small_as_asked_and_its_graph_lives_alone() -> None:
    sizes: list[int] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(logits))
        return cross_entropy(logits, targets)

    def most_of(examples: int) -> int:
        batch = tuple(part[:examples] for part in data())
        found = HVPOperator(net(), [batch], criterion, max_possible_gpu_samples=13)
        with counted_graphs() as graphs:
            found.apply(torch.ones(found.size, dtype=torch.float64))
        return graphs.most

    alone, four = most_of(13), most_of(50)
    assert 0 < four <= alone
    assert max(sizes) == 13


def test_batches_may_be_shuffled() -> None:
    model = net()
    shuffled = DataLoader(TensorDataset(*data()), batch_size=20, shuffle=True)
    found = HVPOperator(model, shuffled, cross_entropy)
    vector = torch.ones(found.size, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(found.apply(vector), dense(model, data()) @ vector)
    values, _ = compute_hessian_eigenthings(model, shuffled, cross_entropy, 2, mode="lanczos")
    assert values[-1] == pytest.approx(float(torch.linalg.eigvalsh(dense(model, data()))[-1]))


def test_a_product_with_one_batch_takes_the_next() -> None:
    model, (inputs, targets) = net(), data()
    found = HVPOperator(model, loader(20), cross_entropy, full_dataset=False)
    vector = torch.ones(found.size, dtype=torch.float64)
    for start in (0, 20, 40, 0):
        part = slice(start, start + 20)
        expected = dense(model, (inputs[part], targets[part])) @ vector
        torch.testing.assert_close(found.apply(vector), expected)


def test_an_operator_follows_the_parameters() -> None:
    model = net()
    found = HVPOperator(model, loader(20), cross_entropy)
    vector = torch.ones(found.size, dtype=torch.float64)
    before = found.apply(vector)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(found.apply(vector), dense(model, data()) @ vector)
    assert not torch.allclose(found.apply(vector), before)


def test_batch_norm_uses_and_keeps_its_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().train()
    with torch.no_grad():
        model(data()[0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.warns(UserWarning, match="in train mode, but the Hessian is computed in eval mode"):
        found = HVPOperator(model, loader(20), cross_entropy)
    vector = torch.ones(found.size, dtype=torch.float64)
    product = found.apply(vector)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(product, dense(model.eval(), data()) @ vector)


def test_parameters_that_are_frozen_or_unused() -> None:
    model = net()
    model[0].requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.forward = lambda inputs: model[2](model[1](model[0](inputs)))  # type: ignore[method-assign]
    found = HVPOperator(model, loader(20), cross_entropy)
    assert found.size == 18 + 2
    torch.testing.assert_close(
        torch.stack([found.apply(v) for v in torch.eye(20, dtype=torch.float64)]),
        dense(model, data()),
    )


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="vec has shape"):
        HVPOperator(net(), [], cross_entropy).apply(torch.ones(1, 43, dtype=torch.float64))
    with pytest.raises(ValueError, match="max_possible_gpu_samples=0"):
        HVPOperator(net(), [], cross_entropy, max_possible_gpu_samples=0)
    with pytest.raises(ValueError, match="requires_grad_"):
        HVPOperator(net().requires_grad_(False), [], cross_entropy)


@pytest.mark.parametrize("full_dataset", [True, False])
def test_the_gradient_is_kept_with_its_graph(full_dataset: bool) -> None:
    model, (inputs, targets) = net(), data()
    made = HVPOperator(model, loader(20), cross_entropy, full_dataset=full_dataset)
    assert not made.grad_vec.any()
    gradient = made.prepare_grad()
    assert made.grad_vec is gradient
    end = 50 if full_dataset else 20
    loss = cross_entropy(model(inputs[:end]), targets[:end])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.reshape(-1) for g in expected]))
    v = torch.randn_like(gradient)
    product = torch.autograd.grad(gradient @ v, list(model.parameters()))
    torch.testing.assert_close(
        torch.cat([h.reshape(-1) for h in product]),
        dense(model, (inputs[:end], targets[:end])) @ v,
    )


def test_gradients_are_set_to_zero_where_they_exist() -> None:
    model = net()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    HVPOperator(model, loader(20), cross_entropy).zero_grad()
    assert not model[0].weight.grad.any()
    assert model[2].weight.grad is None


def test_the_name_of_version_0_1_for_the_size_of_a_piece_is_taken() -> None:
    operator = HVPOperator(net(), loader(20), cross_entropy, max_samples=7)
    assert operator.max_possible_gpu_samples == 7
