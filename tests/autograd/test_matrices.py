"""The library that multiplies matrices."""

from contextlib import nullcontext

import pytest
import torch

from hessfunc.autograd import matrices


@pytest.mark.parametrize(("vendor", "ours"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_the_vendor_of_the_processor_decides(vendor, ours, monkeypatch):
    monkeypatch.setattr(matrices, "_vendor", lambda: vendor)
    monkeypatch.setattr(matrices, "_has_both_libraries", lambda: True)
    x = torch.ones(1)
    assert matrices.has_faster(x) == ours
    assert not matrices.has_faster(x.double())
    with matrices.torchs_own():
        assert not matrices.has_faster(x)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("as_operator", [False, True])
def test_products_by_one_dnn_are_those_of_torch(as_operator: bool) -> None:
    a, b = torch.randn(64, 50), torch.randn(50, 30)
    with matrices.as_operations() if as_operator else nullcontext():
        found = matrices.multiplied(a, b)
    torch.testing.assert_close(found, a @ b)
    a.requires_grad_()
    (slope,) = torch.autograd.grad(matrices.multiplied(a, b).sum(), a)
    torch.testing.assert_close(slope, b.sum(1).expand(64, 50))
