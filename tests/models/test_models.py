"""Hugging Face models from configs, and the parts, pools and blocks of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import hessfunc as hf
from tests.cases import Case, case
from tests.reference import gauss_newton, hessian, matrix, relative_error, rows

Attention = str
ATTENTION = ("eager", "sdpa")
VOCABULARY, IGNORED = 9, -100


def made(model: Callable[[], nn.Module]) -> nn.Module:
    """The same small model each time, in float64 and in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model().double().eval()


def gpt2(attention: Attention) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=8,
        n_embd=4,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return made(lambda: GPT2LMHeadModel(config))


def llama(attention: Attention) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        tie_word_embeddings=True,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return made(lambda: LlamaForCausalLM(config))


def bert(attention: Attention) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=8,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return made(lambda: BertForMaskedLM(config))


def vit(attention: Attention) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return made(lambda: ViTForImageClassification(config))


def tolerance(model: Callable[[Attention], nn.Module], attention: Attention) -> float:
    """Llama normalises, and ViT's own attention takes its softmax, in float32 in any dtype."""
    return 1e-5 if model is llama or (model is vit and attention == "eager") else 1e-8


def text(lengths: tuple[int, ...], *, masked: bool) -> dict[str, Tensor]:
    """Sentences padded on the right; a masked language model predicts every second token."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    present = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    predicted = present.clone()
    if masked:
        predicted[:, ::2] = False
    return {
        "input_ids": ids.masked_fill(~present, 0),
        "attention_mask": present.long(),
        "labels": ids.masked_fill(~predicted, IGNORED),
    }


def images(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        "pixel_values": torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64),
        "labels": torch.randint(3, (count,), generator=generator),
    }


def loss_of(model: nn.Module, **options: Any) -> tuple[hf.Loss, dict[str, Tensor]]:
    """The loss of dict batches, with the labels moved by one where the model is causal."""
    model_fn, params = hf.functional(model, **options)
    causal = type(model).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")

    def logits(params: Any, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: entry for name, entry in batch.items() if name != "labels"}
        found: Tensor = model_fn(params, inputs).logits
        if causal:
            found = found[:, :-1]
        return found if found.dim() == 2 else found.transpose(1, 2)

    def targets(batch: Mapping[str, Tensor]) -> Tensor:
        return batch["labels"][:, 1:] if causal else batch["labels"]

    return hf.composed(logits, cross_entropy, targets=targets), params


# A model, one batch, and parameters so few that their dense matrices are small.
MODELS: dict[str, tuple[Callable[[Attention], nn.Module], dict[str, Tensor], str]] = {
    "gpt2, tied head": (gpt2, text((5, 3), masked=False), "*.wte.weight"),
    "gpt2, attention": (gpt2, text((5, 3), masked=False), "*.h.0.attn.c_attn.*"),
    "llama, tied head": (llama, text((5, 3), masked=False), "*.embed_tokens.weight"),
    "llama, attention": (llama, text((5, 3), masked=False), "*.0.self_attn.k_proj.weight"),
    "llama, norm": (llama, text((5, 3), masked=False), "*norm.weight"),
    "bert, tied head": (bert, text((6, 4), masked=True), "*.word_embeddings.weight"),
    "bert, attention": (bert, text((6, 4), masked=True), "*.layer.0.attention.*"),
    "vit, attention": (vit, images(3), "*.layer.0.attention.*"),
    "vit, patches": (vit, images(3), "*.patch_embeddings.*"),
}


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


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model", [gpt2, llama, bert, vit])
def test_blocks_of_vectors_have_the_products_of_single_ones(
    model: Any, attention: Attention
) -> None:
    loss, params = loss_of(model(attention))
    batch = images(2) if model is vit else text((5, 3), masked=model is bert)
    v = hf.random_like(params, 4, seed=0)
    for curvature in (hf.hvp, hf.ggnvp):
        one, all_at_once = (curvature(loss, chunk_size=c)(params, batch)(v) for c in (1, 4))
        assert relative_error(rows(all_at_once), rows(one)) < tolerance(model, attention)


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


# Slices


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


def places(params: Mapping[str, Tensor], slices: Mapping[str, Any]) -> Tensor:
    """The places of slices in the flat vector of these parameters."""
    whole, start = {}, 0
    for name, leaf in params.items():
        whole[name] = torch.arange(start, start + leaf.numel()).view(leaf.shape)
        start += leaf.numel()
    return torch.cat([whole[name][index].flatten() for name, index in slices.items()])


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


# Pools


def traces(seeds: list[int], sizes: list[int]) -> tuple[Case, list[hf.results.Estimate]]:
    """Trace estimates of batches of these sizes."""
    found, start, estimates = case("conv"), 0, []
    inputs, targets = found.batch
    for seed, size in zip(seeds, sizes, strict=True):
        batch = inputs[start : start + size], targets[start : start + size]
        start += size
        matvec = hf.ggnvp(found.loss)(found.params, batch)
        estimates.append(hf.hutchinson(matvec, found.params, max_matvecs=64, seed=seed))
    return found, estimates


def test_pooled_estimates_are_of_the_trace_over_all_examples() -> None:
    found, estimates = traces([0, 1], [4, 1])
    pooled = hf.pool(estimates, [4, 1])
    exact = float(gauss_newton(found.loss, found.params, found.batch).trace())
    assert pooled.value == pytest.approx(
        0.8 * estimates[0].value + 0.2 * estimates[1].value, rel=1e-12
    )
    assert pooled.stderr**2 == pytest.approx(
        (0.8 * estimates[0].stderr) ** 2 + (0.2 * estimates[1].stderr) ** 2
    )
    assert abs(pooled.value - exact) < 4 * pooled.stderr
    assert sum(pooled.by_leaf.values()) == pytest.approx(pooled.value)
    assert list(pooled.by_leaf) == list(found.params)
    assert pooled.matvecs == sum(e.matvecs for e in estimates)


def test_estimates_count_alike_without_weights() -> None:
    _, estimates = traces([0, 1], [3, 2])
    pooled = hf.pool(estimates)
    assert pooled.value == pytest.approx((estimates[0].value + estimates[1].value) / 2)
    low, high = pooled.interval(0.9)
    assert low < pooled.value < high


def test_the_pool_of_one_estimate_is_that_estimate() -> None:
    _, (estimate,) = traces([0], [5])
    pooled = hf.pool([estimate], [3.0])
    assert (pooled.value, pooled.stderr) == pytest.approx((estimate.value, estimate.stderr))
    assert pooled.interval() == pytest.approx(estimate.interval())


@pytest.mark.parametrize(
    ("seeds", "weights", "message"),
    [
        ([0, 1], [1.0], "2 estimates and 1 weights"),
        ([0, 1], [0.0, 0.0], "weights"),
        ([], None, "estimates"),
        ([3, 3], None, "share a seed"),
    ],
)
def test_estimates_that_cannot_be_pooled_are_refused(
    seeds: list[int], weights: list[float] | None, message: str
) -> None:
    _, estimates = traces(seeds, [2] * len(seeds))
    with pytest.raises((TypeError, ValueError), match=message):
        hf.pool(estimates, weights)


# Spectra by block


def all_eigenvalues(matvec: Any, like: Any) -> Tensor:
    """Of a small matrix, by its products with the identity."""
    dense = matrix(matvec, like)
    return torch.linalg.eigvalsh((dense + dense.mT) / 2)


def own_eigenvalues(dense: Tensor, params: Mapping[str, Tensor], chosen: list[str]) -> Tensor:
    at = places(params, dict.fromkeys(chosen, ...))
    return torch.linalg.eigvalsh(dense[at][:, at])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (None, {n: [n] for n in ("0.weight", "0.bias", "2.weight", "2.bias")}),
        (["0.*", "2.bias"], {"0.*": ["0.weight", "0.bias"], "2.bias": ["2.bias"]}),
        (
            {"biases": ["0.bias", "2.bias"], "matrices": lambda name, leaf: leaf.dim() == 2},
            {"biases": ["0.bias", "2.bias"], "matrices": ["0.weight", "2.weight"]},
        ),
    ],
    ids=["each leaf", "globs", "groups"],
)
@pytest.mark.parametrize(
    ("curvature", "dense"), [(hf.hvp, hessian), (hf.ggnvp, gauss_newton)], ids=["hvp", "ggnvp"]
)
def test_block_spectra_are_the_eigenvalues_of_the_dense_blocks(
    curvature: Any, dense: Any, blocks: Any, expected: dict[str, list[str]]
) -> None:
    found = case("mlp")
    inputs, targets = found.batch
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    seen: list[str] = []
    spectra = hf.block_spectra(
        found.loss,
        found.params,
        batches,
        blocks=blocks,
        curvature=curvature,
        algorithm=all_eigenvalues,
        callback=lambda name, _: seen.append(name),
    )
    assert list(spectra) == list(expected) == seen
    whole = dense(found.loss, found.params, found.batch)
    for name, chosen in expected.items():
        torch.testing.assert_close(
            spectra[name], own_eigenvalues(whole, found.params, chosen), rtol=1e-8, atol=1e-10
        )


def test_block_spectra_of_all_layers_of_a_model_by_lanczos_and_by_default() -> None:
    loss, params = loss_of(vit("sdpa"))
    blocks = {f"layer {i}": f"vit.encoder.layer.{i}.attention.*" for i in range(2)}
    batches = [images(2), images(3)]
    top = hf.block_spectra(
        loss, params, batches, blocks=blocks, algorithm=functools.partial(hf.lanczos, k=1, seed=0)
    )
    densities = hf.block_spectra(loss, params, batches[:1], blocks=blocks)
    for name, pattern in blocks.items():
        part, rest = hf.split(params, pattern)
        held = hf.hold(loss, rest)
        dense = sum(len(b["labels"]) * hessian(held, part, b) for b in batches) / 5
        assert isinstance(dense, Tensor)
        values = torch.linalg.eigvalsh(dense)
        largest = values[values.abs().argmax()]
        torch.testing.assert_close(top[name].values[0], largest, rtol=1e-6, atol=1e-9)
        assert densities[name].n == len(values)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["0.*", "5.*"], r"'5\.\*' chooses none of the leaves 0\.weight"),
        ({"named": ["0.weight", "7.bias"]}, r"no leaf named 7\.bias"),
    ],
)
def test_blocks_that_choose_nothing_are_refused_before_any_work(blocks: Any, message: str) -> None:
    def never(*_: Any) -> None:
        pytest.fail("a block was computed")

    found = case("mlp")
    with pytest.raises(ValueError, match=message):
        hf.block_spectra(found.loss, found.params, [found.batch], blocks=blocks, algorithm=never)


def test_block_spectra_take_no_iterator() -> None:
    found = case("mlp")
    with pytest.raises(TypeError, match="read only once"):
        hf.block_spectra(found.loss, found.params, iter([found.batch]))


# Losses without targets, several outputs


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


def test_blocks_of_a_language_model_are_weighted_by_tokens() -> None:
    loss, params = loss_of(gpt2("eager"))
    whole = text((6, 4, 2), masked=False)
    parts = [{n: entry[rows] for n, entry in whole.items()} for rows in (slice(1), slice(1, 3))]
    blocks = ["*.h.0.ln_1.*"]

    def tokens(batch: Mapping[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def largest(batches: list[dict[str, Tensor]], **options: Any) -> Tensor:
        algorithm = functools.partial(hf.lanczos, k=2, seed=0, rtol=1e-8)
        found = hf.block_spectra(
            loss, params, batches, blocks=blocks, algorithm=algorithm, **options
        )
        return found[blocks[0]].values

    expected = largest([whole])
    for keep in (False, True):
        torch.testing.assert_close(largest(parts, weight=tokens, keep=keep), expected)
    # The targets of torch's cross-entropy are counted without a weight, too.
    torch.testing.assert_close(largest(parts), expected)
    assert not torch.allclose(largest(parts, weight=hf.examples), expected, rtol=1e-3)


def test_a_cache_of_keys_is_refused_under_recomputation() -> None:
    model = gpt2("eager")
    model.config.use_cache = True
    model_fn, params = hf.functional(model, recompute="transformer.h.?")
    with pytest.raises(ValueError, match="use_cache = False"):
        model_fn(params, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
