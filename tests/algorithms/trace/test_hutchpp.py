from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.sketch import Sketch, SketchedProbes
from hessfunc.algorithms.trace import hutchpp
from hessfunc.spaces.of import space_of
from tests.reference.spectra import decaying, symmetric

N = 200
LIKE = {"a": torch.zeros(10, 10).double(), "b": torch.zeros(N - 100).double()}
MATRIX = symmetric(decaying(N)["slow exponential"])


def test_samples_are_what_the_formula_says() -> None:
    space = space_of(LIKE)
    sketched, probes = space.probes(range(12), kind="sphere", seed=0).split([5, 7])
    Q = torch.linalg.qr((sketched @ MATRIX).mT).Q.mT
    sketch = Sketch(Q, Q @ MATRIX, torch.eye(5).double())
    state = SketchedProbes(probes, probes @ MATRIX, sketch, 0)
    parts, squares = hutchpp._samples(space, state)
    outside = torch.eye(N).double() - Q.mT @ Q
    for g, found, square in zip(probes, parts.sum(1), squares, strict=True):
        # The direction of the probe outside of the sketch, of length (n - q)^(1/2).
        u = outside @ g
        u *= (N - 5) ** 0.5 / u.norm()
        assert float(found) == pytest.approx(float((Q @ MATRIX @ Q.mT).trace() + u @ MATRIX @ u))
        assert float(square) == pytest.approx(float((outside @ MATRIX @ u).square().sum()))


def test_exact_where_the_sketch_holds_the_range() -> None:
    spectrum = torch.where(torch.arange(N) < 7, torch.arange(1.0, N + 1), 0.0)
    found = hf.hutchpp(hf.dense(symmetric(spectrum)), LIKE, max_matvecs=24, seed=0)
    assert found.value == pytest.approx(28, rel=1e-10)
    low, high = found.interval()
    assert low <= 28 <= high
    assert high - low < 1e-8


def test_rounds_reuse_every_product() -> None:
    once = hf.hutchpp(hf.dense(MATRIX), LIKE, max_matvecs=60, block_size=20, seed=2)
    rounds = hf.hutchpp(hf.dense(MATRIX), LIKE, max_matvecs=60, block_size=5, seed=2)
    assert rounds.value == pytest.approx(once.value, rel=1e-9)
    assert (once.matvecs, rounds.matvecs) == (60, 60)
    assert (once.passes, rounds.passes) == (2, 8)


def test_stops_at_the_tolerance_with_fewer_products_than_hutchinson() -> None:
    found = hf.hutchpp(hf.dense(MATRIX), LIKE, rtol=0.02, max_matvecs=1000, seed=0)
    plain = hf.hutchinson(hf.dense(MATRIX), LIKE, kind="signs", rtol=0.02, max_matvecs=5000, seed=0)
    assert found.reason.startswith("converged")
    assert found.matvecs < plain.matvecs / 4


def test_squared_frobenius_norm_from_the_same_products() -> None:
    norm = hf.hutchpp(hf.dense(MATRIX), LIKE, max_matvecs=300, seed=1).squared_frobenius
    assert norm is not None
    low, high = norm.interval(0.99)
    assert low <= float(MATRIX.square().sum()) <= high


def test_a_budget_below_two_probes_is_refused() -> None:
    with pytest.raises(ValueError, match="max_matvecs=5: it must be at least 6"):
        hf.hutchpp(hf.dense(MATRIX), LIKE, max_matvecs=5)
