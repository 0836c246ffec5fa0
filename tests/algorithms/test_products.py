"""Products are counted, and refused where they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.products import Products


def test_product_that_is_not_finite_names_the_leaf() -> None:
    def matvec(block: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": block["a"], "b": block["b"] * float("nan")}

    with pytest.raises(FloatingPointError, match="NaN or infinite, at b"):
        hf.lanczos(matvec, {"a": torch.zeros(3), "b": torch.zeros(4)}, k=1)


def test_finite_products_whose_sum_overflows_are_let_through() -> None:
    products = Products.of(lambda block: torch.full_like(block, 3e38), torch.zeros(9))
    assert bool(products(torch.ones(1, 9)).isfinite().all())


def test_a_matvec_that_works_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="changes its block in place: return a new one"):
        hf.lanczos(lambda block: block.mul_(2), torch.zeros(9), k=1)


def test_a_tree_without_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="no entries"):
        hf.xtrace(lambda block: block, torch.zeros(0, 3))


@pytest.mark.parametrize(
    "algorithm",
    [hf.lanczos, hf.power_iteration, hf.hutchinson, hf.xtrace, hf.xdiag, hf.slq, hf.cg, hf.minres],
)
def test_algorithms_are_refused_inside_of_transforms(algorithm: Callable[..., Any]) -> None:
    matrix = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))

    def value(scale: Tensor) -> Tensor:
        algorithm(lambda block: scale * block @ matrix, torch.ones(4, dtype=torch.float64))
        return scale

    with pytest.raises(NotImplementedError, match=r"hf\.attached"):
        torch.func.grad(value)(torch.ones((), dtype=torch.float64))
