"""Losses with two halves, held and composed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from tests.cases import case
from tests.reference import flat, hessian, relative_error


def test_a_supervised_loss_shows_its_halves() -> None:
    model_fn, params = hf.functional(nn.Linear(3, 2))
    loss = hf.supervised(model_fn, nn.CrossEntropyLoss())
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    outputs = loss.outputs(params, (x, y))
    assert torch.equal(outputs, model_fn(params, x))
    assert torch.equal(loss.criterion(outputs, (x, y)), F.cross_entropy(outputs, y))
    assert torch.equal(loss(params, (x, y)), F.cross_entropy(outputs, y))


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (torch.zeros(2, 3), "a Tensor:"),
        ((torch.zeros(2, 3),), "a tuple of length 1"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, "a dict of length 2"),
    ],
)
def test_a_supervised_loss_of_another_batch_names_composed(batch: Any, named: str) -> None:
    model_fn, params = hf.functional(nn.Linear(3, 2))
    loss = hf.supervised(model_fn, F.cross_entropy)
    with pytest.raises(TypeError, match=rf"got {named}.*use `composed\(outputs, criterion\)`"):
        loss(params, batch)


PAIR = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("batches", "named"),
    [
        (DataLoader(TensorDataset(*PAIR)), "a DataLoader"),
        ([PAIR], "a list of length 1"),
        ([PAIR, PAIR, PAIR], "a list of length 3"),
    ],
)
def test_a_supervised_loss_of_many_batches_names_over_batches(batches: Any, named: str) -> None:
    model_fn, params = hf.functional(nn.Linear(3, 2))
    loss = hf.supervised(model_fn, F.cross_entropy)
    with pytest.raises(TypeError, match=rf"got {named}: .*over_batches\(hvp\(loss\)\)"):
        hf.hvp(loss)(params, batches)


@pytest.mark.parametrize(
    "made",
    [
        lambda model: hf.supervised(model, F.cross_entropy),
        lambda model: hf.composed(model, F.cross_entropy),
        hf.hvp,
    ],
    ids=["supervised", "composed", "hvp"],
)
def test_a_module_in_place_of_a_pure_function_is_refused(made: Any) -> None:
    with pytest.raises(TypeError, match=r"Linear is a module.*params = functional\(model\)"):
        made(nn.Linear(3, 2))


def test_a_composed_loss_gives_both_halves_the_batch() -> None:
    loss = hf.composed(lambda p, batch: p * batch["x"], lambda out, batch: (out - batch["y"]).sum())
    batch = {"x": torch.tensor([2.0, 3.0]), "y": torch.tensor([1.0, 1.0])}
    assert loss(torch.tensor([1.0, 2.0]), batch) == 6.0
    assert torch.equal(loss.outputs(torch.tensor([1.0, 2.0]), batch), torch.tensor([2.0, 6.0]))


@pytest.mark.parametrize("name", ["mlp", "tied head", "residual", "gpt2"])
@pytest.mark.parametrize("plain", [False, True])
def test_the_hessian_of_a_held_loss_is_the_dense_sub_block(name: str, plain: bool) -> None:
    found = case(name)
    first = next(iter(found.params))
    chosen, rest = hf.split(found.params, lambda n, _: n != first and "weight" in n)
    held = hf.hold((lambda p, b: found.loss(p, b)) if plain else found.loss, rest)
    whole = hessian(found.loss, found.params, found.batch)
    place = flat({n: torch.full_like(p, n in chosen) for n, p in found.params.items()}).bool()
    assert relative_error(hessian(held, chosen, found.batch), whole[place][:, place]) < 1e-12


def test_a_held_loss_is_a_loss_and_a_held_function_a_function() -> None:
    found = case("mlp")
    chosen, rest = hf.split(found.params, "2.*")
    held = hf.hold(found.loss, rest)
    assert isinstance(held, hf.Loss)
    expected = found.loss.outputs(found.params, found.batch)
    assert torch.equal(held.outputs(chosen, found.batch), expected)
    assert not isinstance(hf.hold(lambda p, b: found.loss(p, b), rest), hf.Loss)


def test_nested_parameters_can_be_held() -> None:
    params = {"a": {"w": torch.tensor(2.0), "b": torch.tensor(3.0)}, "c": torch.tensor(5.0)}

    def loss(p: Any, batch: Tensor) -> Tensor:
        return p["a"]["w"] * p["a"]["b"] * p["c"] * batch

    chosen, rest = hf.split(params, "a.w")
    assert hf.hold(loss, rest)(chosen, torch.tensor(7.0)) == 210.0


def test_held_parameters_carry_no_gradient() -> None:
    rest = {"b": torch.ones(2, requires_grad=True)}
    held = hf.hold(lambda p, _: (p["a"] * p["b"]).sum(), rest)
    assert not held({"a": torch.ones(2)}, None).requires_grad
