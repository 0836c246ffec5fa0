from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessfunc.kronecker import moments
from hessfunc.kronecker.linear_maps import OneHot

# [B, G, N, P]: examples, groups, entries, positions.
SLOPES = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
INPUTS = torch.randn(5, 2, 6, 4, generator=torch.Generator().manual_seed(1)).double()


def input_moments(inputs: Any, sharing: Any) -> Tensor:
    total, terms = moments.summed_input_moments(inputs, sharing)
    return total / terms


def test_moments_of_all_positions() -> None:
    expected = torch.einsum("bgop,bgqp->goq", SLOPES, SLOPES)
    torch.testing.assert_close(moments.outer_moments(SLOPES, "expand"), expected)
    expected = torch.einsum("bgkp,bglp->gkl", INPUTS, INPUTS) / (5 * 4)
    torch.testing.assert_close(input_moments(INPUTS, "expand"), expected)


def test_moments_of_sums_and_means_over_positions() -> None:
    summed, mean = SLOPES.sum(-1), INPUTS.mean(-1)
    expected = torch.einsum("bgo,bgq->goq", summed, summed)
    torch.testing.assert_close(moments.outer_moments(SLOPES, "reduce"), expected)
    expected = torch.einsum("bgk,bgl->gkl", mean, mean) / 5
    torch.testing.assert_close(input_moments(INPUTS, "reduce"), expected)


def test_wide_moments_are_symmetric_products(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = moments.outer_moments(SLOPES, "expand")
    monkeypatch.setattr(moments, "_ROWS", 1)
    torch.testing.assert_close(moments.outer_moments(SLOPES, "expand"), expected)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("at_once", [1, 2**20])
def test_squares_of_the_gradients_of_examples(
    positions: int, shared: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "AT_ONCE", at_once)
    slopes, inputs = SLOPES[..., :positions], INPUTS[: 1 if shared else 5, ..., :positions]
    gradients = torch.einsum("bgop,bgkp->bgok", slopes, inputs.expand(5, -1, -1, -1))
    expected = gradients.square().sum(0)
    torch.testing.assert_close(moments.squared_moments(slopes, inputs), expected)


def test_each_row_of_an_example_has_a_column_of_its_own() -> None:
    columns = torch.randn(2, 6, 3)
    parts = moments.by_row(columns, 3)
    assert len(parts) == 2 * 2
    torch.testing.assert_close(parts[0] + parts[1], columns[0])
    assert not parts[0][1::2].any()
    assert not parts[1][0::2].any()
    assert len(moments.by_row(columns, 6)) == 2


def test_moments_of_a_lookup_are_those_of_unit_vectors() -> None:
    """The index 6 has no input, as the padding of an embedding."""
    indices = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(2))
    hot = torch.nn.functional.one_hot(indices, 7)[..., :6].mT[:, None].double()
    lookup, slopes = OneHot(indices, 6), SLOPES[:, :1]
    diagonal = input_moments(lookup, "expand")
    torch.testing.assert_close(
        torch.diag_embed(diagonal), input_moments(hot, "expand"), check_dtype=False
    )
    for function in (moments.weight_gradient, moments.squared_moments):
        torch.testing.assert_close(function(slopes, lookup), function(slopes, hot))
    each, expected = (
        torch.cat([part for _, part in moments.example_gradients(slopes, inputs)])
        for inputs in (lookup, hot)
    )
    torch.testing.assert_close(each, expected)
