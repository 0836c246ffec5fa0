"""Precision of scalars, and rounding of products."""

import pytest
import torch

from hessfunc.numerics import indexed, rounding, wide_dtype, widened
from tests.reference import random_symmetric


def test_scalars_are_in_float64_where_the_device_has_it() -> None:
    assert wide_dtype(torch.device("cpu")) == torch.float64
    assert wide_dtype(torch.device("cuda")) == torch.float64
    assert wide_dtype(torch.device("mps")) == torch.float32


def test_narrow_numbers_are_widened_to_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert widened(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert widened(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_a_device_has_the_index_of_its_tensors() -> None:
    assert indexed("cpu") == torch.ones(1).device
    assert indexed(torch.device("meta")) == torch.ones(1, device="meta").device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_bounds_the_error_of_products_with_unit_vectors(dtype: torch.dtype) -> None:
    exact = random_symmetric(200).to(dtype).double()
    unit = torch.nn.functional.normalize(torch.randn(50, 200)).to(dtype)
    error = (unit @ exact.to(dtype)).double() - unit.double() @ exact
    largest = float(torch.linalg.eigvalsh(exact).abs().max())
    bound = rounding(torch.finfo(dtype).eps, largest)
    assert float(error.norm(dim=1).max()) < bound
    assert bound < 1000 * float(error.norm(dim=1).max())
