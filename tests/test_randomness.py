"""Distribution and independence of counter-based random numbers."""

from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

import hessfunc as hf
from hessfunc.randomness import _words


def test_words_are_those_of_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    found = _words(0, range(4), torch.device("cpu")).tolist()
    assert [word % 2**64 for word in found] == published


def test_probes_stay_the_same_in_every_version() -> None:
    signs = hf.random_like(torch.zeros(12), 1, seed=0)[0].tolist()
    assert signs == [-1, -1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1]
    normals = hf.random_like(torch.zeros(3).double(), 1, kind="normal", seed=0)[0].tolist()
    assert normals == pytest.approx([-1.0057519641895665, -1.7533864705249171, -2.4201613655781236])


N = 100_000


def test_signs_are_balanced() -> None:
    signs = hf.random_like(torch.zeros(N), 4, seed=0)
    assert signs.abs().eq(1).all()
    assert signs.sum(1).abs().max() < 5 * N**0.5


def test_normals_are_normal() -> None:
    normals = hf.random_like(torch.zeros(N).double(), 2, kind="normal", seed=0)
    for row in normals:
        assert kstest(row.numpy(), "norm").pvalue > 1e-3
        assert row.mean().abs() < 5 / N**0.5
        assert (row.var() - 1).abs() < 5 * (2 / N) ** 0.5
        assert (row.pow(4).mean() - 3).abs() < 5 * (96 / N) ** 0.5


def rows_of(kind: Any, *, seed: int, start: int = 0, leaf: str = "a") -> Tensor:
    """One probe, restricted to one of two equal leaves."""
    like = {"a": torch.zeros(N).double(), "b": torch.zeros(N).double()}
    return hf.random_like(like, 1, kind=kind, seed=seed, start=start)[leaf][0]


@pytest.mark.parametrize("kind", ["signs", "normal"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 0}, {"seed": 2**40}),
        ({"seed": 0}, {"seed": -1}),
        ({"seed": 0}, {"seed": 0, "start": 1}),
        ({"seed": 0, "start": 1}, {"seed": 1, "start": 0}),
        ({"seed": 0}, {"seed": 0, "leaf": "b"}),
        ({"seed": 0, "start": 1}, {"seed": 0, "leaf": "b"}),
    ],
)
def test_different_probes_are_uncorrelated(
    kind: Any, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert abs(rows_of(kind, **one) @ rows_of(kind, **other)) < 5 * N**0.5


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_entries_of_one_probe_are_uncorrelated(kind: Any) -> None:
    row = rows_of(kind, seed=0)
    correlations = torch.stack([row[lag:] @ row[:-lag] for lag in range(1, 200)])
    assert correlations.abs().max() < 5 * N**0.5
    assert (row[::2].square() - 1) @ (row[1::2].square() - 1) < 5 * (4 * N / 2) ** 0.5
