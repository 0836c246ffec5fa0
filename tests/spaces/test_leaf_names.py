from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hessfunc.spaces.leaf_names import advice, described, names_of
from hessfunc.trees import flatten

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"a": ONE, "b": {"c": ONE}}, ("a", "b.c")),
        ([ONE, (ONE,)], ("0", "1.0")),
        (ONE, ("params",)),
        ({"a.b": ONE, "a": {"b": ONE}}, ("['a']['b']", "['a.b']")),
    ],
)
def test_names_are_paths_that_tell_leaves_apart(tree: object, names: tuple[str, ...]) -> None:
    assert set(names_of(flatten(tree)[1])) == set(names)


def test_messages_name_the_first_leaves_and_the_remedy() -> None:
    assert described(["a", "b"]) == "2 leaves (a, b)"
    assert described(list("abcde")) == "5 leaves (a, b, c, d, ...)"
    assert "torch.from_numpy" in advice(np.ones(2))
    assert "functional(model)" in advice(nn.Linear(2, 2))
    assert advice(3) == ""
