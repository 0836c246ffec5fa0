"""Generalised problems with a diagonal metric, and the door of both kinds."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

import hessfunc as hf
from tests.algorithms.eigen.test_davidson import interior, matrix


def diagonal(n: int = 120) -> Tensor:
    return torch.linspace(0.1, 3, n, dtype=torch.float64)


def pairs_of(A: Tensor, **options: Any) -> hf.results.Eigenpairs:
    like = torch.zeros(len(A), dtype=torch.float64)
    return hf.lanczos(hf.dense(A), like, **{"k": 3, "rtol": 1e-9, "seed": 0, **options})


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_pairs_of_a_diagonal_metric_are_those_of_the_dense_solver(which: Any) -> None:
    A, D = matrix(interior() - 1), diagonal()
    pairs = pairs_of(A, metric=D, which=which)
    values = torch.from_numpy(scipy.linalg.eigh(A.numpy(), D.diag().numpy(), eigvals_only=True))
    order = {
        "LA": values.argsort(descending=True),
        "SA": values.argsort(),
        "LM": values.abs().argsort(descending=True),
    }[which]
    torch.testing.assert_close(pairs.values, values[order[:3]], rtol=1e-8, atol=1e-8)
    vectors = pairs.vectors
    torch.testing.assert_close((vectors * D) @ vectors.mT, torch.eye(3).double())
    outside = (vectors @ A - pairs.values[:, None] * vectors * D) / D.sqrt()
    torch.testing.assert_close(pairs.residuals, outside.norm(dim=1), rtol=0.1, atol=1e-10)
    assert pairs.certificate is not None


def test_a_diagonal_metric_with_a_shift_a_start_and_a_callback() -> None:
    A, D, seen = matrix(interior()), diagonal(), []
    start = pairs_of(A, metric=D).vectors[:1]

    def watch(pairs: hf.results.Eigenpairs) -> None:
        seen.append((pairs.vectors.square() * D).sum(1))

    options = {"which": "nearest", "sigma": 4.0, "max_matvecs": 20_000}
    pairs = pairs_of(A, metric=D, start=start, callback=watch, **options)
    values = torch.from_numpy(scipy.linalg.eigh(A.numpy(), D.diag().numpy(), eigvals_only=True))
    expected = values[(values - 4).abs().argsort()[:3]]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-8, atol=1e-8)
    for lengths in seen:
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_a_metric_like_a_tree_of_several_leaves() -> None:
    entries = {"w": torch.tensor([[2.0, 3.0], [4.0, 5.0]]), "b": torch.tensor([6.0])}
    metric = {"w": torch.tensor([[1.0, 2.0], [4.0, 0.5]]), "b": torch.tensor([3.0])}

    def matvec(block: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf * entries[name] for name, leaf in block.items()}

    pairs = hf.lanczos(matvec, entries, k=2, which="LA", metric=metric, seed=0)
    torch.testing.assert_close(pairs.values, torch.tensor([10.0, 2.0]).double())
    assert set(pairs.vectors) == {"w", "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "nearest"}, "pass sigma="),
        ({"sigma": 1.0}, "take which='nearest'"),
        ({"which": "closest", "sigma": 1.0}, "or 'nearest'"),
        ({"metric": -torch.ones(9).double()}, "positive and finite"),
        ({"metric": torch.ones(8).double()}, "shape"),
        ({"metric": {"a": torch.ones(9).double()}}, "structure"),
        ({"which": "nearest", "sigma": 0.0, "block_size": 2}, "omit block_size"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(matrix(torch.arange(9.0)), **options)


def test_a_metric_is_a_tree_or_a_matvec() -> None:
    with pytest.raises(TypeError, match="metric"):
        pairs_of(matrix(torch.arange(9.0)), metric="identity")
