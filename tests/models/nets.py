"""Small models of Hugging Face with their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf

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


def places(params: Mapping[str, Tensor], slices: Mapping[str, Any]) -> Tensor:
    """The places of slices in the flat vector of these parameters."""
    whole, start = {}, 0
    for name, leaf in params.items():
        whole[name] = torch.arange(start, start + leaf.numel()).view(leaf.shape)
        start += leaf.numel()
    return torch.cat([whole[name][index].flatten() for name, index in slices.items()])
