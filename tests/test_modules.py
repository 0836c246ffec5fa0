from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from tests.cases import NAMES, TiedHead, TwoInputs, case
from tests.reference import matrix, relative_error


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("name", [name for name in NAMES if "dropout" not in name])
def test_the_pure_function_gives_what_the_module_gives(name: str) -> None:
    found = case(name)
    value = found.loss(found.params, found.batch)
    outputs = found.loss.outputs(found.params, found.batch)
    match inputs := found.batch[0]:
        case dict():
            expected = found.model(**inputs)
        case tuple():
            expected = found.model(*inputs)
        case _:
            expected = found.model(inputs)
    assert type(outputs) is type(expected)
    torch.testing.assert_close(value, found.loss.criterion(expected, found.batch))


def test_params_are_detached_views_in_the_order_of_named_parameters() -> None:
    model = nn.ModuleDict({"z": nn.Linear(2, 2), "a": nn.Linear(2, 1), "m": TiedHead()})
    _, params = hf.functional(model)
    expected = dict(model.named_parameters())
    assert list(params) == list(expected)
    for name, leaf in params.items():
        assert not leaf.requires_grad
        assert leaf.data_ptr() == expected[name].data_ptr()


def test_a_tied_tensor_stands_once_and_is_used_in_both_places() -> None:
    model = TiedHead()
    model_fn, params = hf.functional(model)
    assert list(params) == ["embedding.weight", "inner.weight", "inner.bias"]
    moved = {**params, "embedding.weight": params["embedding.weight"] + 1}
    tokens = torch.arange(7)
    hidden = torch.tanh(model.inner(moved["embedding.weight"]))
    torch.testing.assert_close(model_fn(moved, tokens), hidden @ moved["embedding.weight"].mT)


def test_frozen_parameters_are_left_out_unless_asked_for() -> None:
    model = small_net()
    model[0].requires_grad_(False)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(hf.functional(model)[1]) == trainable
    everything = hf.functional(model, trainable_only=False)[1]
    assert list(everything) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("model", [small_net().requires_grad_(False), nn.Tanh()])
def test_a_module_without_trainable_parameters_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="has no trainable parameter: call `model.requires_grad_"):
        hf.functional(model)


def test_inputs_are_a_tensor_or_positional_or_keywords() -> None:
    model = TwoInputs()
    model_fn, params = hf.functional(model)
    left, right = torch.randn(5, 3), torch.randn(5, 2)
    expected = model(left, right)
    assert torch.equal(model_fn(params, (left, right)), expected)
    assert torch.equal(model_fn(params, [left, right]), expected)
    assert torch.equal(model_fn(params, {"right": right, "left": left}), expected)
    assert torch.equal(model_fn(params, left, right), expected)
    assert torch.equal(model_fn(params, left, right=right), expected)
    assert torch.equal(model_fn(params, right=right, left=left), expected)


def test_buffers_stay_and_each_call_starts_from_them() -> None:
    model = small_net().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model_fn, params = hf.functional(model)
    x = torch.randn(6, 3)
    assert torch.equal(model_fn(params, x), model_fn(params, x))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_model_in_bfloat16_has_params_outputs_and_products_in_their_own_dtype() -> None:
    model = small_net().eval()
    model[3].requires_grad_(False)
    inner: list[torch.dtype] = []
    model[2].register_forward_hook(lambda _, inputs, __: inner.append(inputs[0].dtype))
    model_fn, params = hf.functional(model, dtype=torch.bfloat16)
    x = torch.randn(6, 3)
    outputs = model_fn(params, x)
    assert inner == [torch.bfloat16]
    assert {leaf.dtype for leaf in (outputs, *params.values())} == {torch.float32}
    torch.testing.assert_close(outputs, model(x), atol=0.05, rtol=0.05)
    loss = hf.composed(model_fn, lambda out, _: out.square().mean())
    product = hf.hvp(loss)(params, x)(hf.random_like(params, 2, seed=0))
    assert {leaf.dtype for leaf in product.values()} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "conv", "tied head", "tuple inputs", "mapping inputs"])
@pytest.mark.parametrize("of", [hf.hvp, hf.ggnvp])
def test_products_in_bfloat16_are_near_those_in_full(name: str, of: Any) -> None:
    found = case(name)
    model_fn, params = hf.functional(found.model, dtype=torch.bfloat16)
    loss = hf.supervised(model_fn, found.loss.criterion.criterion)
    product = matrix(of(loss)(params, found.batch), params)
    assert product.dtype == torch.float64
    expected = matrix(of(found.loss)(found.params, found.batch), params)
    assert 0 < relative_error(product, expected) < 0.05


def test_buffers_and_frozen_parameters_are_cast_too_and_integers_are_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(5, 4), nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 2).requires_grad_(False)
            self.register_buffer("places", torch.tensor([0, 2]))

        def forward(self, tokens: Tensor) -> dict[str, Any]:
            assert tokens.dtype == self.places.dtype == torch.int64
            hidden = self.norm(self.embedding(tokens)[:, self.places].flatten(0, 1))
            out = self.head(hidden)
            return {"out": out, "is bfloat16": out.dtype == torch.bfloat16, "tokens": tokens}

    model_fn, params = hf.functional(Net(), dtype=torch.bfloat16)
    outputs = model_fn(params, torch.randint(5, (6, 3)))
    assert outputs["is bfloat16"]
    assert outputs["out"].dtype == torch.float32
    assert outputs["tokens"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_parameters_in_bfloat16_have_products_in_the_wider_dtype(
    dtype: torch.dtype | None,
) -> None:
    model_fn, params = hf.functional(small_net().eval().bfloat16(), dtype=dtype)
    loss = hf.composed(model_fn, lambda out, _: out.float().square().mean())
    out = hf.hvp(loss)(params, torch.randn(6, 3, dtype=dtype or torch.bfloat16))(
        hf.random_like(params, 2, seed=0)
    )
    assert {leaf.dtype for leaf in out.values()} == {dtype or torch.bfloat16}


@pytest.mark.gpu
def test_recurrent_layers_run_without_cudnn_and_leave_it_as_it_was() -> None:
    seen = []
    model = nn.LSTM(3, 4).cuda()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    model_fn, params = hf.functional(model)
    before = torch.backends.cudnn.enabled
    model_fn(params, torch.randn(2, 1, 3).cuda())
    assert seen == [False]
    assert torch.backends.cudnn.enabled == before


@pytest.mark.gpu
def test_the_hessian_of_a_recurrent_layer_on_a_gpu_is_that_on_the_cpu() -> None:
    model = nn.LSTM(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    products = []
    for device in ("cpu", "cuda"):
        model_fn, params = hf.functional(model.to(device))
        loss = hf.composed(model_fn, lambda outputs, _: outputs[0].square().mean())
        products.append(matrix(hf.hvp(loss)(params, x.to(device)), params).cpu())
    assert relative_error(products[1], products[0]) < 1e-8


def test_lazy_parameters_without_a_shape_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh())
    with pytest.raises(ValueError, match="parameter '0.weight' has no shape yet: call `model"):
        hf.functional(model)
    model(torch.randn(2, 5))
    _, params = hf.functional(model)
    assert params["0.weight"].shape == (3, 5)


def test_parameters_and_buffers_that_are_added_later_do_not_reach_the_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model_fn, params = hf.functional(model)
    x = torch.randn(5, 3)
    before = model_fn(params, x)
    nn.utils.parametrizations.weight_norm(model[0])
    model.append(nn.BatchNorm1d(2))
    assert torch.equal(model_fn(params, x), before)
