"""PyHessian itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyHessian, with the function that its density takes and torch has dropped."""
    with warnings.catch_warnings():
        # Of invalid escapes in its source.
        warnings.simplefilter("ignore", SyntaxWarning)
        module = pytest.importorskip("pyhessian", reason="pip install PyHessian: not installed")

    def eig(T: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        assert eigenvectors
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    monkeypatch.setattr(torch, "eig", eig)
    return module


@pytest.fixture
def figures() -> Iterator[Any]:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    yield plt
    plt.close("all")
