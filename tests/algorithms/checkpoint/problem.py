"""A matrix and a run with a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.reference.spectra import symmetric

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


N = 40
LIKE = {"a": torch.zeros(3, 5).double(), "b": torch.zeros(N - 15).double()}
MATRIX = symmetric(0.8 ** torch.arange(N).double())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        names = [item.name for item in dataclasses.fields(one)]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


def run_lanczos(path: Path, **changed: Any) -> hf.results.Eigenpairs:
    options = {"matvec": hf.dense(MATRIX), "like": LIKE, "k": 2, "seed": 1} | changed
    return hf.lanczos(options.pop("matvec"), options.pop("like"), checkpoint=path, **options)
