"""Losses with two halves, held and composed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from tests.cases import case
from tests.models.nets import gpt2, loss_of, places, text
from tests.reference import flat, gauss_newton, hessian, matrix, relative_error


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


def attention_head(params: Mapping[str, Tensor]) -> dict[str, Any]:
    """The second of two heads: its columns of queries, keys and values, its rows of the output."""
    width = len(params["transformer.h.0.attn.c_proj.weight"])
    half = width // 2
    columns = [i * width + half + j for i in range(3) for j in range(half)]
    return {
        "transformer.h.0.attn.c_attn.weight": (slice(None), columns),
        "transformer.h.0.attn.c_attn.bias": columns,
        "transformer.h.0.attn.c_proj.weight": slice(half, None),
    }


SLICES: dict[str, dict[str, Any]] = {
    "rows": {"0.weight": slice(1, 3)},
    "columns": {"0.weight": (slice(None), slice(0, 2))},
    "a list": {"2.weight": [2, 0]},
    "one entry": {"0.bias": 3},
    "a mask": {"0.bias": torch.tensor([True, False, True, False])},
    "a whole leaf": {"0.bias": ...},
    "several, in another order": {"2.bias": slice(1, None), "0.weight": slice(0, 4, 2)},
}


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("plain", [False, True], ids=["Loss", "plain loss"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_hessian_of_a_sliced_loss_is_the_dense_sub_block(
    name: str, plain: bool, mode: Any
) -> None:
    found = case("mlp")
    loss: Any = (lambda p, b: found.loss(p, b)) if plain else found.loss
    part_loss, part = hf.sliced(loss, found.params, SLICES[name])
    assert isinstance(part_loss, hf.Loss) is not plain
    assert list(part) == list(SLICES[name])
    at = places(found.params, SLICES[name])
    dense = matrix(hf.hvp(part_loss, mode=mode)(part, found.batch), part)
    expected = hessian(found.loss, found.params, found.batch)[at][:, at]
    assert relative_error(dense, expected) < 1e-10


@pytest.mark.parametrize(
    ("curvature", "dense"), [(hf.hvp, hessian), (hf.ggnvp, gauss_newton)], ids=["hvp", "ggnvp"]
)
def test_the_curvature_of_one_attention_head_is_the_dense_sub_block(
    curvature: Any, dense: Any
) -> None:
    loss, params = loss_of(gpt2("sdpa"))
    chosen, rest = hf.split(params, "transformer.h.0.attn.*.*")
    batch = text((4, 3), masked=False)
    head_loss, head = hf.sliced(loss, params, attention_head(params))
    at = places(chosen, attention_head(params))
    expected = dense(hf.hold(loss, rest), chosen, batch)[at][:, at]
    assert relative_error(matrix(curvature(head_loss)(head, batch), head), expected) < 1e-8


def test_a_sliced_loss_has_the_value_of_the_whole_and_leaves_params_alone() -> None:
    found = case("mlp")
    before = {name: leaf.clone() for name, leaf in found.params.items()}
    loss, part = hf.sliced(found.loss, found.params, SLICES["columns"])
    assert float(loss(part, found.batch)) == float(found.loss(found.params, found.batch))
    moved = {name: leaf + 1 for name, leaf in part.items()}
    whole = found.params | {"0.weight": found.params["0.weight"].clone()}
    whole["0.weight"][:, :2] += 1
    assert float(loss(moved, found.batch)) == float(found.loss(whole, found.batch))
    assert all(torch.equal(found.params[name], leaf) for name, leaf in before.items())


def test_slices_of_an_unknown_parameter_are_refused() -> None:
    found = case("mlp")
    with pytest.raises(ValueError, match=r"no parameter named 3\.weight"):
        hf.sliced(found.loss, found.params, {"3.weight": slice(1)})


def held_loss(name: str) -> tuple[Any, Any]:
    """A loss with fixed parameters, and the others."""
    found = case("mlp")
    if name == "sliced":
        return hf.sliced(found.loss, found.params, SLICES["columns"])
    chosen, rest = hf.split(found.params, "0.*")
    return hf.hold(found.loss, rest), chosen


@pytest.mark.parametrize("name", ["hold", "sliced"])
def test_compiled_functions_multiply_with_parameters_held_fixed(name: str) -> None:
    loss, params = held_loss(name)
    batch, v = case("mlp").batch, hf.random_like(params, 2, seed=0)

    def product(params: Any, v: Any) -> Any:
        return hf.hvp(loss)(params, batch)(v)

    compiled = torch.compile(product, fullgraph=True, backend="eager")
    assert relative_error(flat(compiled(params, v)), flat(product(params, v))) < 1e-12
