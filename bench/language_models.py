"""Memory and time of products with attention and a linear head, in chunks and whole.

    python -m bench.language_models

"Whole" is what autograd keeps without this library: all logits, and all weights of the attention.
Each cell runs in a process of its own. Results are written to bench/results/language_models.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import hessfunc as hf
from bench.markdown import table
from bench.resident import peak_above
from hessfunc.autograd import chunked_attention

RESULTS = Path(__file__).parent / "results" / "language_models.md"
CURVATURES: dict[str, Callable[..., Any]] = {
    "H, reverse": hf.hvp,
    "H, forward": lambda loss: hf.hvp(loss, mode="forward"),
    "GGN": hf.ggnvp,
}
TOKENS, WORDS, WIDTH = 2048, 50_304, 64
LENGTHS = (512, 1024, 2048, 4096)
HEADS = 4
MIB = 2**20


def head(kind: str) -> tuple[Any, Any]:
    """Return the loss of a linear head, and its parameters."""
    inputs, targets = torch.randn(TOKENS, WIDTH), torch.randint(WORDS, (TOKENS,))
    params = {"weight": 0.1 * torch.randn(WORDS, WIDTH), "inner": 0.1 * torch.randn(WIDTH, WIDTH)}

    def states(p: Any, _: Any) -> Any:
        return torch.tanh(inputs @ p["inner"]) @ p["inner"], p["weight"], None

    loss = hf.linear_head_loss(states, lambda _: targets)
    return (loss if kind == "chunks" else hf.Loss(loss.outputs, loss.criterion)), params


def attention(kind: str, length: int) -> tuple[Any, Any]:
    """Return a loss of causal attention, and its parameters."""
    if kind == "whole":
        chunked_attention._SHORT = length**2
    size = HEADS * WIDTH
    inputs = torch.randn(1, length, size)

    def outputs(p: Any, _: Any) -> Any:
        q, k, v = (inputs @ p["w"].T).view(1, length, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    loss = hf.composed(outputs, lambda out, _: out.square().mean())
    return loss, {"w": 0.05 * torch.randn(3 * size, size)}


def measured(what: str, kind: str, curvature: str) -> tuple[float, float]:
    """Return the peak of a linearisation and a product in MiB, and processor seconds a product."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss, params = head(kind) if what == "head" else attention(kind, int(what))
    block = {name: torch.randn(1, *leaf.shape) for name, leaf in params.items()}
    made: list[Any] = []

    def first() -> Any:
        made[:] = [CURVATURES[curvature](loss)(params, None)]
        return made[0](block)

    peak = peak_above(first) / MIB
    seconds = []
    for _ in range(3):
        start = time.process_time()
        made[0](block)
        seconds.append(time.process_time() - start)
    return peak, statistics.median(seconds)


def main() -> None:
    if len(sys.argv) > 1:
        print(*measured(*sys.argv[1:]))
        return
    titles = {"head": f"head: {TOKENS:,} tokens, {WORDS:,} words, width {WIDTH}"}
    titles |= {
        str(n): f"attention: {n:,} tokens, {HEADS} heads of width {WIDTH}, causal" for n in LENGTHS
    }
    rows = [["", "product", "whole, MiB", "chunks, MiB", "memory", "time"]]
    for what, title in titles.items():
        for curvature in CURVATURES:
            found = {}
            for kind in ("whole", "chunks"):
                command = [sys.executable, "-m", "bench.language_models", what, kind, curvature]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[kind] = [float(x) for x in output.split()]
            (whole, slow), (chunks, fast) = found["whole"], found["chunks"]
            ratios = [f"{chunks / whole:.2f}", f"{fast / slow:.2f}"]
            rows.append([title, curvature, f"{whole:,.0f}", f"{chunks:,.0f}", *ratios])
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    text = (
        "# Attention and heads of language models\n\nPeak above the process before, and processor "
        f"time a product, chunks / whole; float32, one thread, torch {torch.__version__}.\n\n"
        f"{table(rows)}\n"
    )
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
