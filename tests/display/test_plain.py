"""Values as plain Python."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hessfunc.display import plain


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.ones(2), [1.0, 1.0]),
        (torch.tensor([[True]]), [[True]]),
        (torch.tensor(2.5, dtype=torch.bfloat16), 2.5),
        (torch.ones(2, requires_grad=True), [1.0, 1.0]),
        ({1: torch.ones(1), "b": (2, "c")}, {"1": [1.0], "b": [2, "c"]}),
        (OrderedDict(a=torch.Size([2, 3])), {"a": [2, 3]}),
        (Pair(torch.ones(1), 4), [[1.0], 4]),
        (torch.float32, "torch.float32"),
    ],
)
def test_values(value: object, expected: object) -> None:
    assert plain(value) == expected
    json.dumps(plain(value))


def test_what_json_lacks_stays_a_float() -> None:
    assert math.isinf(plain(torch.tensor(math.inf)))


def test_other_objects_become_text() -> None:
    assert "lambda" in plain(lambda: 0)
