"""Trained Llama with 260,032 parameters, as a Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def stories260k(path: str | Path, /) -> nn.Module:
    """Return stories260K of karpathy/tinyllamas as a ``LlamaForCausalLM`` in eval mode.

    Args:
        path: Path to ``stories260K_torch.npz``, with the parameter names of llama2.c and a
            ``__config__``.

    Raises:
        ValueError: If the file lacks parameters of the model, or contains others.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with np.load(path, allow_pickle=False) as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files if name[0] != "_"}
        config: dict[str, Any] = json.loads(str(file["__config__"]))
    heads, groups = config["n_heads"], config["n_kv_heads"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["dim"],
            intermediate_size=weights["layers.0.feed_forward.w1.weight"].shape[0],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=config["max_seq_len"],
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="eager",
        )
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "embed_tokens",
    }
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith(("output", "freqs")):
            continue
        if "wq" in name:
            weight = _halves(weight, heads)
        if "wk" in name:
            weight = _halves(weight, groups)
        for old, new in names.items():
            name = name.replace(f"{old}.", f"{new}.")
        state[f"model.{name}"] = weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")
    return model.eval()


def _halves(weight: Tensor, heads: int) -> Tensor:
    # Rotary embedding: llama2.c pairs neighbouring entries, transformers pairs i with i + d / 2.
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def stories_batches(path: str | Path, /) -> list[dict[str, Tensor]]:
    """Return five tokenised stories, one per batch, as ``input_ids`` and ``labels``.

    Args:
        path: Path to ``tinystories_sample_ids.npz``, whose padding is negative.
    """
    with np.load(path, allow_pickle=False) as file:
        ids = torch.from_numpy(file["ids"]).long()
    batches = []
    for row in ids:
        story = row[row >= 0][None]
        batches.append({"input_ids": story, "labels": story})
    return batches


def tokens(batch: dict[str, Tensor], /) -> int:
    """Return the number of predicted tokens: all labels except the first and the ignored ones."""
    return int((batch["labels"][:, 1:] != -100).sum())
