"""Products are counted, and refused where they are wrong."""

from __future__ import annotations

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
