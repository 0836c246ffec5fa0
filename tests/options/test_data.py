from __future__ import annotations

import pytest
import torch
from torch import nn

from hessfunc.options import data


def test_batches_are_an_iterable() -> None:
    batches = [torch.ones(2), torch.ones(3)]
    assert data.batches("batches", batches) is batches
    with pytest.raises(TypeError, match="batches"):
        data.batches("batches", 3)


def test_a_tree_has_tensors_as_leaves() -> None:
    tree = {"w": torch.ones(2), "b": (torch.ones(3),)}
    assert data.tree("params", tree) is tree
    with pytest.raises(TypeError, match="params"):
        data.tree("params", "w")


def test_a_number_of_rows_is_not_a_tree() -> None:
    with pytest.raises(TypeError, match=r"pass like=torch\.zeros\(20, dtype=torch\.float64\)"):
        data.tree("like", 20)
    for value in (True, 0, 2.0):
        with pytest.raises(TypeError, match="pass a tensor, or a"):
            data.tree("like", value)


def test_a_module_is_an_instance() -> None:
    model = nn.Linear(2, 3)
    assert data.module("model", model) is model
    with pytest.raises(TypeError, match="model"):
        data.module("model", nn.Linear)


def test_limits_are_two_numbers() -> None:
    assert data.limits("bounds", torch.tensor([0.5, 2.0])) == (0.5, 2.0)
    with pytest.raises(TypeError, match="bounds"):
        data.limits("bounds", (0.5, 1.0, 2.0))
