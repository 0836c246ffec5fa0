"""Comparison with a report."""

from __future__ import annotations

import pytest
import torch

from hessfunc.compat.curvlinops.utils import allclose_report


def test_differences_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert allclose_report(torch.ones(3), torch.ones(3))
    assert not capsys.readouterr().out
    assert not allclose_report(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.5]))
    assert "1 of 3 entries differ, by up to 5.000e-01" in capsys.readouterr().out
    assert allclose_report(torch.ones(1), torch.full((1,), 1.1), rtol=0.2)
