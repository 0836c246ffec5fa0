"""Targets of ``hessfunc analyze``: a model of the shape of GPT-2 with 124 million parameters.

    torchrun --nproc-per-node 2 -m hessfunc analyze bench.large_gpt:gpt2 \\
        --shard 'layers.*,head,tokens' --curvature ggn --only eigenvalues,trace,density \\
        --k 2 --trace-rtol 0.1 --probes 1 --steps 20 --checkpoint state

The weights are random, and the batch is the begin of tinyshakespeare in $HESSFUNC_DATA, two
characters a token. `small` is the same with 400 thousand parameters. A run that is stopped resumes
when it is started again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.app.problems.data import data_root
from hessfunc.app.problems.gpt import GPT

# Characters are below 128, so that a pair has a number below 128^2.
_CHARACTERS = 128


class _OfClasses(GPT):
    """Logits ``[N, vocabulary, T]``, as `F.cross_entropy` takes them."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).transpose(1, 2)


def tokens(sequences: int, length: int) -> Tensor:
    """Sequences of one token more than the length, without overlap."""
    root = data_root()
    if root is None:
        raise FileNotFoundError("set HESSFUNC_DATA: expected tinyshakespeare/input.txt in it")
    text = (root / "tinyshakespeare" / "input.txt").read_bytes()
    characters = torch.tensor(list(text[: 2 * sequences * (length + 1)]))
    first, second = characters.view(sequences, length + 1, 2).unbind(-1)
    return _CHARACTERS * first + second


def _problem(
    sequences: int, length: int, **shape: int
) -> tuple[GPT, Callable[..., Tensor], list[Any]]:
    torch.manual_seed(0)
    model = _OfClasses(context=length, **shape).eval()
    rows = tokens(sequences, length)
    return model, F.cross_entropy, [(rows[:, :-1], rows[:, 1:])]


def gpt2() -> Any:
    """12 layers of width 768, and 50,304 tokens."""
    return _problem(4, 64, vocabulary=50_304, width=768, layers=12, heads=12)


def small() -> Any:
    """2 layers of width 16, and as many tokens as pairs of characters."""
    return _problem(4, 16, vocabulary=_CHARACTERS**2, width=16, layers=2, heads=4)
