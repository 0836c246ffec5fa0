from __future__ import annotations

from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.options import finite, or_none, validated
from hessfunc.options.door import limited, memory_limit_now


@validated(level=or_none(finite))
def scaled(k: int, *, rtol: float | None = None, level: float | None = 0.95) -> tuple[Any, ...]:
    return k, rtol, level


def test_arguments_are_normalised_by_name() -> None:
    found = scaled(torch.tensor(3), rtol=torch.tensor(0.5))
    assert found == (3, 0.5, 0.95)
    assert [type(value) for value in found] == [int, float, float]


def test_none_is_taken_where_it_is_the_default_or_allowed() -> None:
    assert scaled(1, rtol=None, level=None) == (1, None, None)
    with pytest.raises(TypeError, match="k must be a whole number"):
        scaled(None)


def test_unknown_arguments_raise_the_error_of_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tolerance'"):
        scaled(1, tolerance=2)


@validated
def run_with_options(k: int, **run: Any) -> dict[str, Any]:
    return run


def test_options_of_a_run_are_checked_and_unknown_ones_listed() -> None:
    assert run_with_options(1, seed=torch.tensor(4)) == {"seed": 4}
    with pytest.raises(TypeError, match="no option 'sed': choose one of callback, checkpoint, k"):
        run_with_options(1, sed=4)


def test_limits_of_memory_nest_and_end() -> None:
    assert memory_limit_now() is None
    with limited(3e9), limited(5e9):
        assert memory_limit_now() == 3e9
        with limited(1e9):
            assert memory_limit_now() == 1e9
    assert memory_limit_now() is None
    with pytest.raises(ValueError, match="memory=0: it must be positive"), limited(0):
        pass


def test_the_memory_of_a_run_holds_inside_of_it_only() -> None:
    limits = []

    def matvec(block: torch.Tensor) -> torch.Tensor:
        limits.append(memory_limit_now())
        return block

    hf.hutchinson(matvec, torch.ones(3), memory=1e9, max_matvecs=4, seed=0)
    assert set(limits) == {1e9}
    assert memory_limit_now() is None
