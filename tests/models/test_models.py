"""Hugging Face models from configs, and the parts, pools and blocks of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import hessfunc as hf
from tests.models.nets import (
    ATTENTION,
    IGNORED,
    MODELS,
    Attention,
    bert,
    gpt2,
    images,
    llama,
    loss_of,
    made,
    text,
    tolerance,
    vit,
)
from tests.reference import gauss_newton, hessian, matrix, relative_error, rows


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("curvature", "dense"), [(hf.hvp, hessian), (hf.ggnvp, gauss_newton)], ids=["hvp", "ggnvp"]
)
def test_products_of_part_of_a_model_equal_the_dense_matrix(
    curvature: Any, dense: Any, name: str, attention: Attention
) -> None:
    model, batch, pattern = MODELS[name]
    loss, params = loss_of(model(attention))
    part, rest = hf.split(params, pattern)
    held = hf.hold(loss, rest)
    found = matrix(curvature(held)(part, batch), part)
    assert relative_error(found, dense(held, part, batch)) < tolerance(model, attention)


@pytest.mark.parametrize("model", [gpt2, llama, bert])
def test_a_tied_head_is_one_parameter_and_the_models_own_loss_is_met(model: Any) -> None:
    module = model("eager")
    loss, params = loss_of(module)
    assert sum(leaf.numel() for leaf in params.values()) == sum(
        p.numel() for p in module.parameters()
    )
    assert not any("lm_head.weight" in name or "decoder.weight" in name for name in params)
    batch = text((5, 3), masked=model is bert)
    # Its own loss is taken in float32.
    assert float(loss(params, batch)) == pytest.approx(module(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model", [gpt2, llama, bert])
@pytest.mark.parametrize("curvature", [hf.hvp, hf.ggnvp, hf.efvp])
def test_padding_changes_no_product(curvature: Any, model: Any, attention: Attention) -> None:
    loss, params = loss_of(model(attention))
    batch = text((5, 3), masked=model is bert)
    longer = {
        name: torch.nn.functional.pad(entry, (0, 2), value=IGNORED if name == "labels" else 0)
        for name, entry in batch.items()
    }
    v = hf.random_like(params, 2, seed=0)
    found = rows(curvature(loss)(params, longer)(v))
    expected = rows(curvature(loss)(params, batch)(v))
    assert relative_error(found, expected) < tolerance(model, attention)


@pytest.mark.parametrize("model", [gpt2, bert])
def test_batches_weighted_by_their_tokens_make_the_curvature_of_all_tokens(model: Any) -> None:
    loss, params = loss_of(model("eager"))
    start = int(model is gpt2)
    whole = text((6, 4, 4), masked=model is bert)
    parts = [{n: entry[rows] for n, entry in whole.items()} for rows in (slice(1), slice(1, 3))]

    def tokens(batch: Mapping[str, Tensor]) -> int:
        return int((batch["labels"][:, start:] != IGNORED).sum())

    assert tokens(parts[0]) != tokens(parts[1])
    v = hf.random_like(params, 2, seed=0)
    found = hf.over_batches(hf.hvp(loss), weight=tokens)(params, parts)(v)
    assert relative_error(rows(found), rows(hf.hvp(loss)(params, whole)(v))) < 1e-10


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (gpt2, "transformer.h.?"),
        (llama, "model.layers.?"),
        (bert, "bert.encoder.layer.?"),
        (vit, "vit.encoder.layer.?"),
    ],
)
def test_recomputed_layers_change_no_product(model: Any, layers: str) -> None:
    module = model("sdpa")
    module.config.use_cache = False
    batch = images(2) if model is vit else text((5, 3), masked=model is bert)
    (loss, params), (again, _) = loss_of(module), loss_of(module, recompute=layers)
    v = hf.random_like(params, 2, seed=0)
    for curvature in (hf.hvp, hf.ggnvp):
        expected = rows(curvature(loss)(params, batch)(v))
        found = rows(curvature(again)(params, batch)(v))
        assert relative_error(found, expected) < tolerance(model, "sdpa")


@pytest.mark.parametrize("model", [gpt2, llama, bert, vit])
def test_bfloat16_is_near_and_gives_float32(model: Any) -> None:
    module = model("eager").float()
    (loss, params), (low, _) = loss_of(module), loss_of(module, dtype=torch.bfloat16)
    batch = images(8) if model is vit else text((6, 4, 5), masked=model is bert)
    batch = {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}
    v = hf.random_like(params, 1, seed=0)
    found = rows(hf.ggnvp(low)(params, batch)(v))
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, rows(hf.ggnvp(loss)(params, batch)(v))) < 0.1


def test_a_physics_informed_loss_has_the_dense_curvature() -> None:
    net = made(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    net_fn, params = hf.functional(net)

    def residuals(params: Any, points: Tensor) -> Tensor:
        u = lambda point: net_fn(params, point).squeeze()  # noqa: E731
        second = torch.func.vmap(torch.func.hessian(u))(points).view(-1, 1)
        return second + net_fn(params, points)

    loss = hf.composed(residuals, lambda r, _: mse_loss(r, torch.zeros_like(r)))
    points = torch.linspace(0, 3, 5, dtype=torch.float64)[:, None]
    for curvature, dense in ((hf.hvp, hessian), (hf.ggnvp, gauss_newton)):
        found = matrix(curvature(loss)(params, points), params)
        assert relative_error(found, dense(loss, params, points)) < 1e-8


def test_a_cache_of_keys_is_refused_under_recomputation() -> None:
    model = gpt2("eager")
    model.config.use_cache = True
    model_fn, params = hf.functional(model, recompute="transformer.h.?")
    with pytest.raises(ValueError, match="use_cache = False"):
        model_fn(params, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
