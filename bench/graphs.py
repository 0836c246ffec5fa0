"""What the graph of a transformer's Hessian product holds at its peak, fitted to small ones.

    python -m bench.graphs

The constants of `hessfunc.app.plan.Transformer`: numbers a token, by least squares over GPTs of
several depths, widths, heads, contexts and vocabularies, with layers kept and computed again.
What is as large as the parameters, the gradient, the product, and the largest leaf twice, is not
counted. Results are written to bench/results/graphs.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import hessfunc as hf
from bench.markdown import table
from hessfunc.app.plan import Transformer
from hessfunc.app.problems.gpt import GPT, next_token_loss
from hessfunc.memory import Footprint

RESULTS = Path(__file__).parent / "results" / "graphs.md"


class Size(NamedTuple):
    """Of a GPT and a batch."""

    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int
    sequences: int

    @property
    def tokens(self) -> int:
        return self.context * self.sequences


SIZES = [
    Size(512, 64, 128, 4, 4, 8),
    Size(512, 64, 128, 12, 4, 8),
    Size(512, 64, 256, 4, 4, 8),
    Size(4096, 64, 128, 4, 4, 8),
    Size(512, 256, 128, 4, 4, 4),
    Size(512, 128, 128, 4, 8, 4),
    Size(512, 128, 128, 2, 16, 8),
    Size(2048, 128, 256, 3, 4, 4),
    Size(1024, 256, 192, 6, 6, 2),
    Size(512, 64, 96, 24, 3, 8),
]


class Held(NamedTuple):
    """What was counted, and the parameters of the net."""

    numbers: float
    params: int


def held(size: Size, recompute: str | None) -> Held:
    """The numbers of the graph of one product, at its peak."""
    torch.manual_seed(0)
    model = GPT(size.vocabulary, size.context, size.width, size.layers, size.heads, tied=False)
    model_fn, params = hf.functional(model, recompute=recompute)
    loss = hf.composed(model_fn, next_token_loss)
    tokens = torch.randint(size.vocabulary, (size.sequences, size.context))
    vector = hf.random_like(params, 1, seed=0)
    with Footprint() as found:
        hf.hvp(loss)(params, tokens)(vector)
    sizes = [leaf.numel() for leaf in params.values()]
    return Held(found.peak / 4 - 2 * sum(sizes) - 2 * max(sizes), sum(sizes))


def fitted(found: Sequence[Held], *, recompute: bool) -> list[float]:
    """The numbers a token of each part: of relative squares the least."""
    rows = []
    for size in SIZES:
        layer, score = size.width, size.heads * size.context
        if recompute:
            rows.append([size.layers * layer, layer, score, size.vocabulary])
        else:
            rows.append([size.layers * layer, size.layers * score, size.vocabulary])
    tokens = torch.tensor([[size.tokens] for size in SIZES])
    counted = torch.tensor([[one.numbers] for one in found], dtype=torch.float64)
    relative = torch.tensor(rows, dtype=torch.float64) * tokens / counted
    return torch.linalg.lstsq(relative, torch.ones_like(counted)).solution.flatten().tolist()


def main() -> None:
    torch.set_num_threads(1)
    parts = []
    for recompute in (None, "layers.*"):
        found = [held(size, recompute) for size in SIZES]
        again = recompute is not None
        constants = ", ".join(f"{value:.1f}" for value in fitted(found, recompute=again))
        names = "between, layer, score, logit" if again else "layer, score, logit"
        rows = [["parameters", *Size._fields, "counted, M", "planned / counted"]]
        for size, one in zip(SIZES, found, strict=True):
            shape = Transformer(one.params, size.layers, size.width, size.heads, size.vocabulary)
            expected = shape.numbers(size.tokens, size.context, recompute=again)
            counted = f"{one.numbers / 1e6:.2f}"
            ratio = f"{expected / one.numbers:.2f}"
            rows.append([f"{one.params:,}", *map(str, size), counted, ratio])
        title = "computed again" if again else "kept"
        parts.append(f"## Layers {title}\n\n{table(rows)}\n\nFitted: {names} = {constants}.\n")
    text = "# The graphs of transformers\n\n" + "\n".join(parts)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
