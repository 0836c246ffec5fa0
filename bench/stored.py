"""Error and memory of products whose weights are stored in 16 bits.

    HESSFUNC_DATA=... python -m bench.stored

Each Gauss-Newton product is compared with that of the same weights in float64. Tensors are counted
exactly by `Footprint`, parameters, vector and product included. Results are printed, and written to
bench/results/stored.md.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from bench.markdown import table
from hessfunc.app.problems.data import data_root
from hessfunc.app.problems.gpt import GPT
from hessfunc.app.problems.llama import stories260k, stories_batches
from hessfunc.memory import Footprint

RESULTS = Path(__file__).parent / "results" / "stored.md"
MIB = 2**20
VOCABULARY, TOKENS, SEQUENCES = 256, 64, 4


def gpt() -> tuple[nn.Module, Any]:
    """Random GPT with 9.6 million parameters, and a batch."""
    torch.manual_seed(0)
    model = GPT(VOCABULARY, TOKENS, width=320, layers=8, heads=8).eval()
    tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1))
    return model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def llama() -> tuple[nn.Module, Any]:
    """Trained Llama with 260,032 parameters, and a story."""
    root = data_root()
    if root is None:
        raise FileNotFoundError("set HESSFUNC_DATA: expected stories260K/ in it")
    batch = stories_batches(root / "stories260K" / "tinystories_sample_ids.npz")[0]
    ids = batch["input_ids"]
    model = stories260k(root / "stories260K" / "stories260K_torch.npz")
    return model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def matvec_of(
    model: nn.Module, batch: Any, **options: Any
) -> tuple[Callable[[Any], Any], dict[str, Tensor]]:
    """The product of the Gauss-Newton matrix, and the parameters."""
    model_fn, params = hf.functional(model, **options)

    def outputs(params: Any, batch: Any) -> Tensor:
        found = model_fn(params, batch["input_ids"])
        logits: Tensor = getattr(found, "logits", found)
        return logits.flatten(0, 1)

    loss = hf.composed(outputs, F.cross_entropy, targets=lambda b: b["labels"].flatten())
    return hf.ggnvp(loss)(params, batch), params


# Weights and computation.
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32, float32": (torch.float32, {}),
    "bfloat16, bfloat16": (torch.bfloat16, {}),
    "bfloat16, float32": (torch.bfloat16, {"dtype": torch.float32}),
}


def rows(name: str, make: Callable[[], tuple[nn.Module, Any]], layers: str) -> Iterator[list[str]]:
    """The error and the memory of each way, with and without recomputed layers."""
    model, batch = make()
    model = model.bfloat16()
    exact, params = matvec_of(copy.deepcopy(model).double(), batch)
    v = {key: leaf[0].float().double() for key, leaf in hf.random_like(params, 1, seed=0).items()}
    wanted = hf.ravel(hf.apply(exact, v))
    del exact
    for way, (stored, options) in WAYS.items():
        for recompute in (None, layers):
            gc.collect()
            with Footprint() as memory:
                own = copy.deepcopy(model).to(stored)
                matvec, like = matvec_of(own, batch, recompute=recompute, **options)
                gc.collect()
                held, memory.peak = memory.now, memory.now
                vector = {key: leaf.to(like[key].dtype) for key, leaf in v.items()}
                product = hf.apply(matvec, vector)
            found = hf.ravel(product).double()
            error = float((found - wanted).norm() / wanted.norm())
            sizes = [f"{x / MIB:.1f}" for x in (held, memory.peak)]
            yield [name, way, "layers" if recompute else "", f"{error:.1e}", *sizes]
            del matvec, product, vector, own


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    head = ["model", "weights, computation", "recomputed", "error", "held MiB", "peak MiB"]
    found = [head]
    for name, make, layers in (
        ("Llama, 260k, trained", llama, "model.layers.*"),
        ("GPT, 10M, random", gpt, "layers.*"),
    ):
        for row in rows(name, make, layers):
            print(row, flush=True)
            found.append(row)
    RESULTS.write_text(
        "# Weights stored in 16 bits\n\nOne product of the Gauss-Newton matrix, beside that of the "
        "same weights in float64; torch "
        f"{torch.__version__}, one thread.\n\n**error**: 2-norm of the difference over that of the "
        "product. **held**: bytes of tensors before the product: parameters, their copy and the "
        "kept graph. **peak**: the same during the product, with the vector and the product.\n\n"
        f"{table(found)}\n"
    )


if __name__ == "__main__":
    main()
