"""Hessian spectra of the layers of a small language model.

    python examples/llm_layers.py       # a table, and llm_layers.png

The blocks of a transformer's Hessian differ widely between layers and between kinds of layers. One
learning rate therefore does not suit all of them, but Adam's individual rates do (Zhang et al.
2024, Why transformers need Adam, arXiv 2402.16788). `block_spectra` computes the spectrum of one
block after another, with all other parameters held fixed.

The model is stories260K, a trained Llama with five layers, if the folder HESSFUNC_DATA contains it.
Otherwise it has the same architecture with random weights, and reads random tokens.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc import plot
from hessfunc.algorithms.results import Density
from hessfunc.app.problems.data import data_root
from hessfunc.app.problems.llama import stories260k, stories_batches

Batch = dict[str, Tensor]


def model_and_batch() -> tuple[nn.Module, Batch]:
    root = data_root()
    folder = None if root is None else root / "stories260K"
    if folder is not None and folder.is_dir():
        print("stories260K, trained")
        stories = stories_batches(folder / "tinystories_sample_ids.npz")
        return stories260k(folder / "stories260K_torch.npz"), stories[0]
    print("random weights and tokens, because HESSFUNC_DATA has no folder stories260K")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, use_cache=False, **sizes, **heads))
        ids = torch.randint(512, (1, 200))
    return model.eval(), {"input_ids": ids, "labels": ids}


def next_token_loss(model_fn: Any) -> hf.Loss:
    def logits(params: Any, batch: Batch) -> Tensor:
        return model_fn(params, {"input_ids": batch["input_ids"]}).logits[:, :-1].transpose(1, 2)

    return hf.composed(logits, cross_entropy, targets=lambda batch: batch["labels"][:, 1:])


def blocks_of(layers: int) -> dict[str, str]:
    """Return the pattern of the parameters of each block, by the name of the block."""
    blocks = {"embedding": "model.embed_tokens.*"}
    for i in range(layers):
        blocks[f"attention {i}"] = f"model.layers.{i}.self_attn.*"
        blocks[f"MLP {i}"] = f"model.layers.{i}.mlp.*"
    return blocks


def mean(density: Density) -> float:
    """Return the mean eigenvalue, tr H / n."""
    return float((density.nodes * density.weights).sum() / len(density.nodes))


def main(*, small: bool = False, out: Path = Path("llm_layers.png")) -> dict[str, Density]:
    model, batch = model_and_batch()
    length, steps = (24, 6) if small else (200, 30)
    batch = {name: row[:, :length] for name, row in batch.items()}
    rows = batch["input_ids"].shape[0]
    print(f"{rows} sequence{'s' * (rows > 1)} of {length} tokens, {steps} products per block")
    model_fn, params = hf.functional(model)
    print(f"{'block':14}{'n':>9}{'largest':>11}{'smallest':>11}{'mean':>11}")

    def show(name: str, density: Density) -> None:
        low, high = float(density.nodes.min()), float(density.nodes.max())
        print(f"{name:14}{density.n:9,}{high:11.4f}{low:11.4f}{mean(density):11.2e}")

    spectra: dict[str, Density] = hf.block_spectra(
        next_token_loss(model_fn),
        params,
        [batch],
        blocks=blocks_of(model.config.num_hidden_layers),
        keep=True,
        algorithm=partial(hf.slq, probes=1, steps=steps, seed=0),
        callback=show,
    )
    plot.blocks(spectra)[0].figure.savefig(out, dpi=150)
    return spectra


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="Use a small problem that takes a few seconds."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("llm_layers.png"), help="File of the figure."
    )
    main(**vars(parser.parse_args()))
