"""Embeddings: dense gradients, and weights that stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.reference import gauss_newton, hessian, matrix, relative_error

TOKENS, LABELS = torch.tensor([[0, 1], [3, 3], [2, 4]]), torch.tensor([0, 1, 1])


def net(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(6, 2)).double()


@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
def test_renormalised_weights_are_those_of_torch_and_the_users_stay(mode: Any) -> None:
    model = net(nn.Embedding(5, 3, max_norm=0.7))
    before = model[0].weight.detach().clone()
    model_fn, params = hf.functional(model)
    value = model_fn(params, TOKENS)
    found = matrix(
        hf.hvp(hf.supervised(model_fn, F.cross_entropy), mode=mode)(params, (TOKENS, LABELS)),
        params,
    )
    assert torch.equal(model[0].weight, before)
    # torch renormalises the weight itself, and differentiates at the new one.
    torch.testing.assert_close(value, model(TOKENS))
    assert not torch.equal(model[0].weight, before)
    model[0].max_norm = None
    expected_fn, expected_at = hf.functional(model)
    expected = hessian(hf.supervised(expected_fn, F.cross_entropy), expected_at, (TOKENS, LABELS))
    assert relative_error(found, expected) < (1e-5 if mode == "difference" else 1e-10)


def test_a_function_of_the_user_keeps_its_weights_too() -> None:
    params = {"w": torch.randn(5, 3).double()}
    before = params["w"].clone()
    loss = lambda p, x: F.embedding(x, p["w"], max_norm=0.5).exp().mean()  # noqa: E731
    hf.hvp(loss)(params, TOKENS)(hf.random_like(params, 1, seed=0))
    assert torch.equal(params["w"], before)


def test_a_tied_weight_that_is_renormalised_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, max_norm=1.0)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    with pytest.raises(NotImplementedError, match="`max_norm` shares its weight"):
        hf.functional(Tied())


@pytest.mark.parametrize("of", [hf.hvp, hf.ggnvp])
def test_sparse_gradients_are_dense(of: Any) -> None:
    model = net(nn.Embedding(5, 3, sparse=True))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    found = matrix(of(loss)(params, (TOKENS, LABELS)), params)
    model[0].sparse = False
    exact = hessian if of is hf.hvp else gauss_newton
    dense = hf.supervised(hf.functional(model)[0], F.cross_entropy)
    assert relative_error(found, exact(dense, params, (TOKENS, LABELS))) < 1e-10


BAGS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "rows": ((TOKENS,), {}),
    "rows, padding": ((TOKENS,), {"padding_idx": 3}),
    "rows, weights": ((TOKENS,), {"mode": "sum", "per_sample_weights": torch.rand(3, 2).double()}),
    "offsets": ((TOKENS.flatten(), torch.tensor([0, 1, 1, 4])), {}),
    "offsets, padding": ((TOKENS.flatten(), torch.tensor([0, 1, 4])), {"padding_idx": -2}),
    "last offset": (
        (TOKENS.flatten(), torch.tensor([0, 2, 6])),
        {"include_last_offset": True, "mode": "sum"},
    ),
}


@pytest.mark.parametrize("name", BAGS)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_bags_are_sums_of_lookups(name: str, mode: Any) -> None:
    (tokens, *offsets), options = BAGS[name]
    params = {"w": torch.randn(5, 3).double()}

    def loss(p: Any, _: Any) -> Tensor:
        return F.embedding_bag(tokens, p["w"], *offsets, **options).exp().mean()

    def by_matrix(p: Any, _: Any) -> Tensor:
        unit = F.embedding_bag(tokens, torch.eye(5).double(), *offsets, **options)
        return (unit @ p["w"]).exp().mean()

    found = matrix(hf.hvp(loss, mode=mode)(params, None), params)
    assert relative_error(found, hessian(by_matrix, params, None)) < 1e-12


@pytest.mark.parametrize("of", [hf.hvp, hf.ggnvp])
def test_bags_of_a_module_keep_its_weights(of: Any) -> None:
    model = nn.Sequential(
        nn.EmbeddingBag(5, 3, sparse=True, max_norm=0.7), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    before = model[0].weight.detach().clone()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    found = matrix(of(loss)(params, (TOKENS, LABELS)), params)
    assert torch.equal(model[0].weight, before)
    model(TOKENS)
    at = {name: leaf.detach() for name, leaf in model.named_parameters()}

    def outputs(p: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(p["0.weight"][x].mean(1)), p["2.weight"], p["2.bias"])

    exact = hessian if of is hf.hvp else gauss_newton
    right = exact(hf.supervised(outputs, F.cross_entropy), at, (TOKENS, LABELS))
    assert relative_error(found, right) < 1e-6


def test_maxima_of_bags_have_no_second_derivative() -> None:
    model_fn, params = hf.functional(nn.EmbeddingBag(5, 3, mode="max").double())
    loss = hf.supervised(model_fn, F.mse_loss)
    with pytest.raises(NotImplementedError, match="_embedding_bag has no second derivative"):
        matrix(hf.hvp(loss)(params, (TOKENS, torch.ones(3, 3).double())), params)
