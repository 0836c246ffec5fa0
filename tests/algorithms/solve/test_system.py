"""What solvers say of products in low precision."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import hessfunc as hf


@pytest.mark.parametrize("solve", [hf.cg, hf.minres])
def test_the_rounding_that_is_quoted_is_that_of_the_products(
    solve: Callable[..., hf.results.Solution],
) -> None:
    factor = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    matrix = factor @ factor.T / 50 + torch.eye(50)
    found = solve(
        lambda v: (v @ matrix).bfloat16().float(), torch.linspace(0.3, 1.7, 50), rtol=1e-6
    )
    assert not found.converged
    quoted = re.search(r"rounded to ([\d.e+-]+);", found.reason)
    assert quoted
    assert 1e-4 < float(quoted[1]) < 2e-2
