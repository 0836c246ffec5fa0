from __future__ import annotations

import pytest
import torch

from hessfunc.spaces.inner_products import gram, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("j", "k"), [(1, 1), (2, 2), (3, 7), (7, 3)])
@pytest.mark.parametrize("run", [64, 2**14])
def test_inner_products_are_those_of_float64(dtype: torch.dtype, j: int, k: int, run: int) -> None:
    rows, others = torch.randn(j, 70_001).to(dtype), torch.randn(k, 70_001).to(dtype)
    products = gram(rows, others, run=run)
    assert products.dtype == torch.float64
    expected = rows.double() @ others.double().mT
    scale = rows.double().norm(dim=1)[:, None] * others.double().norm(dim=1)
    assert float(((products - expected) / scale).abs().max()) < 1e-6


@pytest.mark.parametrize("n", [5, 2**16 + 3])
def test_norms_of_float32_rows_are_those_of_float64(n: int) -> None:
    rows = torch.randn(3, n)
    torch.testing.assert_close(norms(rows), rows.double().norm(dim=1), rtol=1e-9, atol=0)
