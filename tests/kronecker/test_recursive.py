"""Factors of `kfra`, averaged over the batches of a data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hessfunc as hf
from tests.kronecker.cases import net

SIZES = (2, 5, 4)


def layers() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_a_data_set_are_means_over_examples(sharing: Any) -> None:
    case = net(layers, 2, 4, examples=sum(SIZES))
    batches = list(zip(*(part.split(SIZES) for part in case.batch), strict=True))
    kfra = hf.kronecker.kfra(case.loss, case.model, sharing=sharing)
    blocks = hf.over_batches(kfra)(case.params, batches)
    each = [kfra(case.params, batch) for batch in batches]
    for name, block in blocks.items():
        for side in ("left", "right"):
            parts = (n * getattr(one[name], side) for n, one in zip(SIZES, each, strict=True))
            torch.testing.assert_close(getattr(block, side), sum(parts) / sum(SIZES))
    b = hf.random_like(case.params, 2, seed=0)
    x = blocks.inverse(0.1)(b)
    image = blocks(x)
    for name, leaf in b.items():
        torch.testing.assert_close(image[name] + 0.1 * x[name], leaf, rtol=0, atol=1e-10)
