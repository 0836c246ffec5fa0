"""Losses of the language models of Hugging Face."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hessfunc as hf
from tests.reference import flat, relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}


def of(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))


MODELS = {
    "tied head": of("GPT2LMHeadModel", "GPT2Config", n_layer=1, n_head=2, n_embd=16, vocab_size=40),
    "head of its own": of("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "bounded logits": of(
        "Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8, final_logit_softcapping=0.7
    ),
    "multiplied logits": of("CohereForCausalLM", "CohereConfig", **GROUPED, logit_scale=0.3),
    "divided logits": of("GraniteForCausalLM", "GraniteConfig", **GROUPED, logits_scaling=3.0),
    "masked": of("BertForMaskedLM", "BertConfig", **SMALL),
    "encoder and decoder": of(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
    ),
}
IDS = torch.arange(1, 17).view(2, 8)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def batch_of(name: str) -> dict[str, torch.Tensor]:
    labels = torch.where(torch.arange(8) > torch.tensor([[7], [4]]), -100, IDS)
    batch = {"input_ids": IDS, "attention_mask": (labels != -100).long(), "labels": labels}
    return batch | ({"decoder_input_ids": IDS} if name == "encoder and decoder" else {})


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_model(name: str) -> None:
    model, batch = made(name), batch_of(name)
    loss, params = hf.language_model_loss(model, rows_per_chunk=5)
    assert params.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        # The models compute their loss in float32.
        assert torch.isclose(loss(params, batch), model(**batch).loss.double(), rtol=1e-6)
    whole = hf.Loss(loss.outputs, loss.criterion)
    vector = {k: v[0] for k, v in hf.random_like(params, 1, seed=0).items()}
    for curvature in (hf.hvp, hf.ggnvp):
        found, due = (hf.apply(curvature(x)(params, batch), vector) for x in (loss, whole))
        assert relative_error(flat(found), flat(due)) < 1e-10


def test_the_options_of_functional_are_taken() -> None:
    model, batch = made("tied head"), batch_of("tied head")
    loss, params = hf.language_model_loss(model)
    recomputed, _ = hf.language_model_loss(model, recompute="transformer.h.*")
    rounded, _ = hf.language_model_loss(model, dtype=torch.float32)
    value = loss(params, batch)
    assert torch.isclose(recomputed(params, batch), value, rtol=1e-12)
    assert 1e-12 < abs(float(rounded(params, batch) / value) - 1) < 1e-5
    model.transformer.wte.requires_grad_(False)
    _, rest = hf.language_model_loss(model)
    assert params.keys() - rest.keys() == {"transformer.wte.weight"}


def test_the_model_is_not_changed() -> None:
    model = made("masked")
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    loss, params = hf.language_model_loss(model)
    loss(params, batch_of("masked"))
    assert type(model) is transformers.BertForMaskedLM
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


class Scaled(nn.Module):
    """Language model whose logits are not those of its head alone."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.embedding, self.head = nn.Embedding(40, 4), nn.Linear(4, 40)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> Any:
        return (self.scale * self.head(self.embedding(input_ids)),)


def test_other_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="pass shift=True"):
        hf.language_model_loss(Scaled(1.0))
    with pytest.raises(ValueError, match="are not those of its output embedding"):
        hf.language_model_loss(Scaled(2.0), shift=True)


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(TypeError, match="no output embedding"):
        hf.language_model_loss(nn.Linear(2, 2))
    model = made("tied head")
    model.lm_head = nn.Sequential(nn.Linear(16, 40))
    with pytest.raises(TypeError, match="a Sequential as its head"):
        hf.language_model_loss(model)


def test_a_batch_without_labels_is_refused() -> None:
    loss, params = hf.language_model_loss(made("masked"))
    with pytest.raises(ValueError, match="a mapping with a tensor 'labels'"):
        hf.hvp(loss)(params, {"input_ids": IDS})
    with pytest.raises(ValueError, match="a mapping with a tensor 'labels'"):
        hf.hvp(loss)(params, (IDS, IDS))
    lists = {"input_ids": IDS.tolist(), "labels": IDS.tolist()}
    with pytest.raises(TypeError, match="labels of the batch are a list, not a tensor"):
        loss(params, lists)


def test_the_shift_is_that_of_the_models_own_loss() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, decoder_layers=1, decoder_ffn_dim=24, decoder_attention_heads=2
    )
    model = transformers.BartForCausalLM(config).double().eval()
    loss, params = hf.language_model_loss(model)
    batch = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        assert torch.isclose(loss(params, batch), model(**batch).loss.double(), rtol=1e-6)


class Bounded(transformers.Gemma2ForCausalLM):  # type: ignore[misc,name-defined]
    """Model with a bound of its logits that the config does not name, far above their size."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 30 * torch.tanh(outputs.logits / 30)
        return outputs


def test_unknown_bounds_of_logits_are_refused() -> None:
    config = {**GROUPED, "head_dim": 8, "final_logit_softcapping": None}
    assert hf.language_model_loss(
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config))
    )
    with pytest.raises(ValueError, match="are not those of its output embedding"):
        hf.language_model_loss(Bounded(transformers.Gemma2Config(**config)))


def test_a_recomputed_head_is_refused() -> None:
    for pattern in ("lm_head", "*"):
        with pytest.raises(ValueError, match="has the output embedding"):
            hf.language_model_loss(made("head of its own"), recompute=pattern)


def test_hooks_of_the_head_are_refused() -> None:
    model = made("head of its own")
    model.lm_head.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks or a parametrised weight"):
        hf.language_model_loss(model)


def test_a_replaced_tensor_is_refused() -> None:
    model = made("head of its own")
    model.lm_head.requires_grad_(False)
    loss, params = hf.language_model_loss(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    with pytest.raises(RuntimeError, match="'lm_head.weight' of the model has been replaced"):
        loss(params, batch_of("head of its own"))


@pytest.mark.parametrize("name", ["num_items_in_batch", "shift_labels"])
def test_arguments_that_change_the_models_loss_are_refused(name: str) -> None:
    loss, params = hf.language_model_loss(made("tied head"))
    with pytest.raises(ValueError, match=f"the batch has '{name}'"):
        loss(params, batch_of("tied head") | {name: IDS})


def test_a_decoder_needs_its_inputs() -> None:
    loss, params = hf.language_model_loss(made("encoder and decoder"))
    with pytest.raises(ValueError, match="needs 'decoder_input_ids'"):
        loss(params, {"input_ids": IDS, "labels": IDS})


def test_narrow_models_are_compared_in_float32() -> None:
    model = made("head of its own").bfloat16()
    loss, params = hf.language_model_loss(model)
    assert loss(params, batch_of("head of its own")).dtype == torch.bfloat16


def test_factors_know_the_model_of_the_loss() -> None:
    """The loss evaluates a copy without the head, whose layers are those of the model."""
    options = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 40}
    model = of("GPT2LMHeadModel", "GPT2Config", **options, tie_word_embeddings=False)().eval()
    batch = {"input_ids": IDS, "labels": IDS}
    loss, params = hf.language_model_loss(model)
    made = hf.kronecker.kfac(loss, model, seed=0)(params, batch)
    assert set(made) == set(params)
    other = of("GPT2LMHeadModel", "GPT2Config", **options)()
    with pytest.raises(ValueError, match="evaluates .* and does not call this GPT2"):
        hf.kronecker.kfac(loss, other, seed=0)(params, batch)
    random, params = hf.language_model_loss(model.train())
    with pytest.raises(ValueError, match="Dropout .* in train mode changes with each call"):
        hf.kronecker.kfac(random, model, seed=0)(params, batch)
