"""Parts of tokens in the scores of training examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)).double()
MODEL_FN, PARAMS = hf.functional(MODEL)
TOKENS = torch.randint(6, (5, 4), generator=torch.Generator().manual_seed(1))
TARGETS = TOKENS.roll(1, 1).clone()
TARGETS[0, 2:] = -100
TRAIN = [(TOKENS[:3], TARGETS[:3]), (TOKENS[3:], TARGETS[3:])]


def rows(params: Any, batch: Any) -> Tensor:
    return MODEL_FN(params, batch[0]).flatten(0, 1)


FLAT = hf.composed(rows, F.cross_entropy, targets=lambda batch: batch[1].flatten())
LOSSES = {
    "flat": FLAT,
    "classes": hf.supervised(lambda p, x: MODEL_FN(p, x).movedim(-1, 1), F.cross_entropy),
    "sum": hf.supervised(
        lambda p, x: MODEL_FN(p, x).movedim(-1, 1), nn.CrossEntropyLoss(reduction="sum")
    ),
}


@pytest.mark.parametrize(("name", "rank"), [*((name, None) for name in LOSSES), ("flat", 3)])
def test_parts_of_tokens_are_inner_products_of_their_gradients(name: str, rank: int | None) -> None:
    loss = LOSSES[name]
    options: dict[str, Any] = {"damping": 0.3, "rtol": 1e-11, "rank": rank}
    found = hf.influence(loss, PARAMS, TRAIN, TRAIN, by_token=True, **options)
    assert found.by_token is not None
    torch.testing.assert_close(found.by_token.sum(2), found.scores)
    if rank is not None:
        return
    eye = torch.eye(hf.ravel(PARAMS).numel(), dtype=torch.float64)
    dense = hf.matrix(hf.over_batches(hf.ggnvp(loss))(PARAMS, TRAIN), PARAMS) + 0.3 * eye
    j, t = 4, 1
    count = 4 if name != "sum" else 1

    def of_token(params: Any) -> Tensor:
        logits = MODEL_FN(params, TOKENS[j : j + 1])[0, t]
        return F.cross_entropy(logits, TARGETS[j, t]) / count

    own = hf.ravel(torch.func.grad(of_token)(PARAMS))
    query = torch.func.grad(lambda p: loss(p, (TOKENS[:1], TARGETS[:1])))(PARAMS)
    expected = hf.ravel(query) @ torch.linalg.solve(dense, own)
    torch.testing.assert_close(found.by_token[0, j, t], expected, rtol=1e-6, atol=1e-10)


def test_losses_of_tokens_are_verified() -> None:
    def each(params: Any, batch: Any) -> Tensor:
        outputs = MODEL_FN(params, batch[0]).movedim(-1, 1)
        return F.cross_entropy(outputs, batch[1], reduction="none")

    def flat(params: Any, batch: Any) -> Tensor:
        return each(params, batch).flatten()

    with pytest.raises(ValueError, match="do not sum to the losses of the examples"):
        hf.influence(FLAT, PARAMS, TRAIN, TRAIN, damping=1.0, by_token=each)
    with pytest.raises(ValueError, match=r"shape \(12,\) for 3 examples"):
        hf.influence(FLAT, PARAMS, TRAIN, TRAIN, damping=1.0, by_token=flat)
    with pytest.raises(ValueError, match="pass by_token=function"):
        hf.influence(lambda p, b: FLAT(p, b), PARAMS, TRAIN, TRAIN, damping=1.0, by_token=True)
    short = [TRAIN[0], (TOKENS[3:, :2], TARGETS[3:, :2])]
    with pytest.raises(ValueError, match="pad all examples"):
        hf.influence(LOSSES["classes"], PARAMS, short, TRAIN, damping=1.0, by_token=True)
