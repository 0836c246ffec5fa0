"""Orthonormal basis of a growing span, and its products."""

from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms import sketch as sketches
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.sketch import Sketch
from hessfunc.spaces.of import space_of
from tests.reference.spectra import symmetric

N = 300
LIKE = {"a": torch.zeros(10, 10).double(), "b": torch.zeros(N - 100).double()}


def test_stops_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    matvec = hf.dense(symmetric(torch.linspace(1, 3, N)))
    probe = 16 * N * 8
    monkeypatch.setattr(sketches, "available_to", lambda space: 2 * 12 * probe)
    found = hf.xtrace(matvec, LIKE, max_matvecs=100, seed=0)
    assert found.matvecs == 24
    assert "no more than 12 probes fit in memory" in found.reason
    monkeypatch.setattr(sketches, "available_to", lambda space: probe)
    with pytest.raises(MemoryError, match="hutchinson"):
        hf.xtrace(matvec, LIKE, seed=0)


def test_a_sketch_has_the_vectors_and_the_products_of_its_basis() -> None:
    n, matrix = 40, symmetric(torch.linspace(-1, 2, 40))
    space = space_of(torch.zeros(n).double())
    products, vectors = Products(hf.dense(matrix), space), torch.randn(7, n, dtype=torch.float64)
    vectors[5] = vectors[0] - 2 * vectors[3]
    sketch = Sketch.empty(space)
    for block in vectors.split([3, 1, 3]):
        sketch = sketch.extended(space, products, block)
    torch.testing.assert_close(sketch.basis @ sketch.basis.mT, torch.eye(6).double())
    torch.testing.assert_close(sketch.factor.mT @ sketch.basis, vectors)
    torch.testing.assert_close(sketch.images, sketch.basis @ matrix)
    assert not sketch.full_rank
    # A vector in the span of the others costs no product.
    assert products.matvecs == 6


def test_what_a_vector_alone_adds_is_orthogonal_to_the_others() -> None:
    n = 20
    space = space_of(torch.zeros(n).double())
    vectors = torch.randn(5, n, dtype=torch.float64)
    sketch = Sketch.empty(space).extended(space, Products(lambda v: v, space), vectors)
    alone = sketch.left_out().mT @ sketch.basis
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(5).double())
    overlaps = alone @ vectors.mT
    torch.testing.assert_close(overlaps, overlaps.diagonal().diag(), rtol=0, atol=1e-12)
    dependent = sketch.extended(space, Products(lambda v: v, space), vectors.sum(0)[None])
    assert float(dependent.left_out().abs().max()) == 0
