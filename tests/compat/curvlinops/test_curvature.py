"""Parameters, data and scales of the curvature of an empirical risk."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.compat.curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
)
from tests.compat.curvlinops import problem
from tests.compat.curvlinops.problem import batches, dense_hessian, matrix, net, parameters, whole

LOSS = nn.CrossEntropyLoss()


def dense(params: dict[str, Tensor]) -> Tensor:
    return dense_hessian(net(), LOSS, params, whole(batches(LOSS)))


@pytest.mark.parametrize("kind", ["list", "reversed", "subset", "dict", "values"])
def test_each_kind_of_parameters_in_each_format_of_vectors(kind: str) -> None:
    model = net()
    given, values = parameters(model, kind)
    H = HessianLinearOperator(model, LOSS, given, batches(LOSS))
    expected = dense(values)
    torch.testing.assert_close(matrix(H), expected)
    assert H.shape == tuple(expected.shape)
    assert (H.dtype, H.device) == (torch.float64, torch.device("cpu"))
    V = {name: torch.randn(*p.shape, 2).double() for name, p in values.items()}
    flat = torch.cat([v.flatten(end_dim=-2) for v in V.values()])
    product = H @ list(V.values())
    torch.testing.assert_close(torch.cat([p.flatten(end_dim=-2) for p in product]), expected @ flat)
    if isinstance(given, dict):
        named = H @ {name: v[..., 0] for name, v in V.items()}
        torch.testing.assert_close(
            torch.cat([p.flatten() for p in named.values()]), expected @ flat[:, 0]
        )


def test_a_function_of_parameters_and_inputs() -> None:
    model = net()
    params = {name: p.detach() for name, p in model.named_parameters()}
    H = HessianLinearOperator(
        lambda p, x: functional_call(model, p, (x,)), LOSS, params, batches(LOSS)
    )
    torch.testing.assert_close(matrix(H), dense(params))


def test_a_model_in_a_wrapper_for_data_parallelism() -> None:
    model = nn.DataParallel(net())
    expected = dense(dict(net().named_parameters()))
    for params in (list(model.parameters()), dict(model.named_parameters())):
        H = HessianLinearOperator(model, LOSS, params, batches(LOSS))
        torch.testing.assert_close(matrix(H), expected)
    product = H @ {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert list(product) == [name for name, _ in model.named_parameters()]


def test_values_other_than_those_of_the_model() -> None:
    model = net()
    params = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    H = HessianLinearOperator(model, LOSS, params, batches(LOSS))
    torch.testing.assert_close(matrix(H), dense(params))


def test_products_follow_the_parameters_and_leave_the_model_alone() -> None:
    model = net()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    H = HessianLinearOperator(model, LOSS, list(model.parameters()), batches(LOSS))
    matrix(H)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model[0].weight.add_(0.1)
    moved = dict(before) | {"0.weight": before["0.weight"] + 0.1}
    torch.testing.assert_close(matrix(H), dense(moved))


def test_num_data_and_batch_size_fn_set_the_scale() -> None:
    model, data = net(), batches(LOSS)
    params = list(model.parameters())
    expected = dense(dict(model.named_parameters()))
    for data_of, options, scale in (
        (data, {"num_data": 14}, 0.5),
        (data, {"num_data": 7}, 1.0),
        (data, {"batch_size_fn": len}, 1.0),
    ):
        H = HessianLinearOperator(model, LOSS, params, data_of, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(matrix(H), scale * expected)
    summed = nn.CrossEntropyLoss(reduction="sum")
    H = HessianLinearOperator(model, summed, params, data, num_data=14)
    torch.testing.assert_close(matrix(H), 7 * expected)


def test_a_loss_of_ones_own_is_weighted_by_examples() -> None:
    class Own(nn.Module):
        reduction = "mean"

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return LOSS(outputs, targets)

    model = net()
    H = HessianLinearOperator(model, Own(), list(model.parameters()), batches(LOSS))
    torch.testing.assert_close(matrix(H), dense(dict(model.named_parameters())))


def test_ignored_targets_do_not_count() -> None:
    data = [(x, y.clone()) for x, y in batches(LOSS)]
    data[0][1][:4] = -100
    model = net()
    H = HessianLinearOperator(model, LOSS, list(model.parameters()), data)
    params = dict(model.named_parameters())
    torch.testing.assert_close(matrix(H), dense_hessian(model, LOSS, params, whole(data)))


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_inputs_in_a_mapping(kind: Any) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, given: Any) -> Tensor:
            return self.inner(given["x"])

    model, data = Reads(), [(kind({"x": x}), y) for x, y in batches(LOSS)]
    for options in ({}, {"batch_size_fn": lambda given: len(given["x"])}):
        H = HessianLinearOperator(model, LOSS, list(model.parameters()), data, **options)
        torch.testing.assert_close(matrix(H), dense(dict(net().named_parameters())))


def test_blocks_are_those_of_consecutive_parameters() -> None:
    model = net()
    expected = dense(dict(model.named_parameters()))
    H = HessianLinearOperator(
        model, LOSS, list(model.parameters()), batches(LOSS), block_sizes=[2, 1, 1]
    )
    for start, end in ((0, 16), (16, 28), (28, 31)):
        block = torch.zeros_like(expected, dtype=torch.bool)
        block[start:end, start:end] = True
        torch.testing.assert_close(matrix(H)[start:end, start:end], expected[start:end, start:end])
        assert not (matrix(H)[start:end] * ~block[start:end]).any()
    for sizes in ([1, 1], [4, 0], [5, -1]):
        with pytest.raises(ValueError, match="block_sizes"):
            HessianLinearOperator(
                model, LOSS, list(model.parameters()), batches(LOSS), block_sizes=sizes
            )


def test_gradient_and_loss_are_those_of_all_examples() -> None:
    model = net()
    params = list(model.parameters())
    inputs, targets = whole(batches(LOSS))
    value = LOSS(model(inputs), targets)
    expected = torch.autograd.grad(value, params)
    for options, scale in (({}, 1.0), ({"num_data": 14}, 0.5)):
        H = HessianLinearOperator(model, LOSS, params, batches(LOSS), **options)  # type: ignore[arg-type]
        gradient, loss = H.gradient_and_loss()
        torch.testing.assert_close(loss, scale * value.detach())
        for ours, right in zip(gradient, expected, strict=True):
            torch.testing.assert_close(ours, scale * right)


def test_what_is_not_deterministic_is_refused() -> None:
    model, loss = net(), LOSS
    inputs, targets = whole(batches(LOSS))
    torch.manual_seed(0)
    dropping = nn.Sequential(model, nn.Dropout(0.5))
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="model.eval()"):
        HessianLinearOperator(dropping, loss, list(model.parameters()), [(inputs, targets)])
    assert torch.equal(torch.random.get_rng_state(), before)
    HessianLinearOperator(dropping.eval(), loss, list(model.parameters()), [(inputs, targets)])

    class Augmented:
        def __iter__(self) -> Any:
            yield inputs + torch.rand(()), targets

    with pytest.raises(RuntimeError, match="random augmentation"):
        HessianLinearOperator(model, loss, list(model.parameters()), Augmented())
    H = HessianLinearOperator(
        model, loss, list(model.parameters()), Augmented(), check_deterministic=False
    )
    # Even then, the products of one multiplication belong to one matrix.
    assert matrix(H).shape == (31, 31)


@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator, KFACLinearOperator])
def test_products_are_constants_of_the_inputs_and_vectors(kind: Any) -> None:
    model = net()
    data = [(x.requires_grad_(), y) for x, y in batches(LOSS)]
    A = kind(model, LOSS, list(model.parameters()), data)
    product = A @ torch.ones(31, dtype=torch.float64, requires_grad=True)
    assert not product.requires_grad
    plain = kind(model, LOSS, list(model.parameters()), batches(LOSS))
    torch.testing.assert_close(product, plain @ torch.ones(31).double())


def test_a_shuffled_loader_is_read_in_any_order() -> None:
    model = net()
    loader = DataLoader(TensorDataset(*whole(batches(LOSS))), batch_size=3, shuffle=True)
    H = HessianLinearOperator(model, LOSS, list(model.parameters()), loader)
    torch.testing.assert_close(matrix(H), dense(dict(model.named_parameters())))


def test_wrong_models_parameters_and_data_are_named() -> None:
    model, data = net(), batches(LOSS)
    params = list(model.parameters())
    with pytest.raises(TypeError, match="pass a module, or a function"):
        GGNLinearOperator(model.forward, LOSS, params, data)
    with pytest.raises(ValueError, match="params has no tensors"):
        GGNLinearOperator(model, LOSS, [], data)
    with pytest.raises(ValueError, match="no parameters of the model"):
        GGNLinearOperator(model, LOSS, list(net().parameters()), data)
    with pytest.raises(ValueError, match="twice"):
        GGNLinearOperator(model, LOSS, [params[0], params[0]], data)
    with pytest.raises(ValueError, match="no parameter 'head'"):
        GGNLinearOperator(model, LOSS, {"head": params[0]}, data)
    with pytest.raises(TypeError, match="single batch"):
        GGNLinearOperator(model, LOSS, params, data[0])
    with pytest.raises(TypeError, match="read only once"):
        GGNLinearOperator(model, LOSS, params, iter(data))
    with pytest.raises(TypeError, match="pair"):
        GGNLinearOperator(model, LOSS, params, [(1, 2, 3)])
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(RuntimeError, match="several dtypes"):
        _ = problem.matrix(
            GGNLinearOperator(
                mixed, LOSS, list(mixed.parameters()), data, check_deterministic=False
            )
        )
