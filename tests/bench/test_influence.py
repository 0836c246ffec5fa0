"""Parts of the measurement of linear datamodelling scores."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy

from bench.influence import (
    METHODS,
    Measured,
    Problem,
    correlations,
    functional,
    losses,
    tables,
    trained,
)


def test_correlations_are_spearmans_with_ties() -> None:
    random = np.random.default_rng(0)
    one, two = random.integers(5, size=(2, 3, 9)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(one, two, strict=True)]
    np.testing.assert_allclose(correlations(one, two), expected, rtol=1e-12)


def test_a_copy_is_trained_on_its_own_examples_only() -> None:
    torch.manual_seed(0)
    model_fn, start = functional(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 10)))
    x, y = torch.randn(6, 4), torch.arange(6)
    problem = Problem("", nn.Identity, (x, y), (x, y), partial(torch.optim.Adam, lr=0.03), 60)
    both = trained(model_fn, start, problem, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    first = trained(model_fn, start, problem, torch.tensor([[0, 1, 2]]))
    for name, leaf in first.items():
        torch.testing.assert_close(both[name][0], leaf[0], rtol=1e-4, atol=1e-4)
    found = losses(model_fn, both, (x, y))
    alone = {name: leaf[1] for name, leaf in both.items()}
    expected = cross_entropy(model_fn(alone, x), y, reduction="none")
    torch.testing.assert_close(found[1], expected)
    # Each copy fits its own examples.
    assert found[0, :3].max() < found[0, 3:].min()
    assert found[1, 3:].max() < found[1, :3].min()


def test_the_right_scores_have_a_high_score_and_others_have_not() -> None:
    generator = torch.Generator().manual_seed(0)
    right, wrong = torch.randn(2, 8, 40, generator=generator)
    masks = (torch.rand(20, 40, generator=generator) < 0.5).float()
    scores = {(method, 0.1): wrong for method in METHODS}
    for damping in (1e-2, 3e-2, 1e-1):
        scores |= {("EKFAC", damping): wrong, ("exact GGN", damping): right}
    found = Measured(scores, -(right @ masks.mT), masks, 10, 0.0, 0.0)
    lines = tables({"digits": found}, draws=20)[0].splitlines()[2:4]
    first, second = (line.split("|") for line in lines)
    assert [cell.strip() for cell in first[1:3]] == ["digits", "exact GGN"]
    assert first[4].strip() == "1.000"
    assert abs(float(second[4])) < 0.3
