"""Arguments as they come in: scalars of NumPy and torch, and what is said of wrong ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hessfunc import options


@pytest.mark.parametrize(
    "given", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).int()]
)
def test_whole_numbers(given: Any) -> None:
    assert type(options.whole_number("k", given)) is int
    assert options.whole_number("k", given) == 3


@pytest.mark.parametrize(
    "given", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).bfloat16()]
)
def test_numbers(given: Any) -> None:
    assert type(options.finite("rtol", given)) is float
    assert options.finite("rtol", given) == 0.5


@pytest.mark.parametrize("given", [True, np.bool_(True), np.array(True), torch.tensor(True)])
def test_flags(given: Any) -> None:
    assert options.flag("keep", given) is True


@pytest.mark.parametrize("given", [True, "3", torch.ones(2), None])
def test_other_values_are_no_whole_number(given: Any) -> None:
    with pytest.raises(TypeError, match="k must be a whole number"):
        options.whole_number("k", given)
    with pytest.raises(ValueError, match="k=0.5: it must be a whole number"):
        options.whole_number("k", 0.5)


def test_wrong_values_are_described_in_a_few_words() -> None:
    assert options.described(torch.ones(2, 3)) == "a tensor of shape (2, 3)"
    assert options.described(np.ones(2)) == "a NumPy array of shape (2,)"
    assert options.described("x" * 100) == f"'{'x' * 36}..."
    assert "can be read only once" in options.described(iter([1]))


def test_values_below_the_least_are_refused() -> None:
    options.at_least(1, k=1, probes=None)
    with pytest.raises(ValueError, match=r"probes=0"):
        options.at_least(1, k=2, probes=0)
