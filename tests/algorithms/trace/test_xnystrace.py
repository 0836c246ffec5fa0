from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.trace import xnystrace
from hessfunc.spaces.of import space_of
from tests.reference.spectra import decaying, symmetric

N = 200
LIKE = {"a": torch.zeros(10, 10).double(), "b": torch.zeros(N - 100).double()}
MATRIX = symmetric(decaying(N)["slow exponential"])


def test_estimates_are_what_the_formula_says() -> None:
    n, p = 30, 6
    matrix = symmetric(0.8 ** torch.arange(n).double())
    space = space_of({"a": torch.zeros(10).double(), "b": torch.zeros(20).double()})
    probes = space.probes(range(p), kind="sphere", seed=0)
    state = xnystrace._State(probes, probes @ matrix, 0)
    approximation = xnystrace._nystrom(space, state, eps=2e-16)
    one = xnystrace._leave_one_out(space, state, approximation)[0].sum(1)
    two = xnystrace._leave_two_out(approximation)

    def expected(i: int, kept: list[int]) -> float:
        w = probes[kept]
        nystrom = (w @ matrix).mT @ torch.linalg.inv(w @ matrix @ w.mT) @ (w @ matrix)
        outer = probes[i] - w.mT @ torch.linalg.solve(w @ w.mT, w @ probes[i])
        rescaling = (n - len(kept)) / outer.square().sum()
        return float(nystrom.trace() + rescaling * outer @ (matrix - nystrom) @ outer)

    for i in range(p):
        others = [m for m in range(p) if m != i]
        assert float(one[i]) == pytest.approx(expected(i, others), rel=1e-9)
        for j in others:
            without = [m for m in others if m != j]
            assert float(two[i, j]) == pytest.approx(expected(i, without), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 7, 15])
def test_exact_from_one_probe_more_than_the_rank(rank: int) -> None:
    index = torch.arange(1.0, N + 1).double()
    spectrum = torch.where(rank >= index, index, 0.0)
    matvec = hf.dense(symmetric(spectrum))
    found = hf.xnystrace(matvec, LIKE, max_matvecs=rank + 2, block_size=4, seed=0)
    assert found.value == pytest.approx(float(spectrum.sum()), rel=1e-9)
    low, high = found.interval()
    assert low <= float(spectrum.sum()) <= high


def test_accuracy_on_fast_decay() -> None:
    spectrum = decaying(1000)["exponential"]
    like = torch.zeros(1000).double()
    for seed in range(20):
        found = hf.xnystrace(lambda v: v * spectrum, like, max_matvecs=50, seed=seed)
        assert found.value == pytest.approx(float(spectrum.sum()), abs=1e-5)


def test_needs_fewer_products_than_xtrace() -> None:
    ours = hf.xnystrace(hf.dense(MATRIX), LIKE, rtol=0.01, max_matvecs=300, seed=0)
    theirs = hf.xtrace(hf.dense(MATRIX), LIKE, rtol=0.01, max_matvecs=300, seed=0)
    assert ours.reason.startswith("converged")
    assert ours.matvecs < theirs.matvecs


def test_a_negative_eigenvalue_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive semi-definite.*Take `xtrace`"):
        hf.xnystrace(hf.dense(symmetric(torch.linspace(-1, 4, N))), LIKE, seed=0)


def test_zero_matrix() -> None:
    found = hf.xnystrace(lambda block: {k: 0 * v for k, v in block.items()}, LIKE, seed=0)
    assert found.value == pytest.approx(0, abs=1e-12)


def test_float32() -> None:
    spectrum = decaying(N)["exponential"]
    matvec = hf.dense(symmetric(spectrum).float())
    found = hf.xnystrace(matvec, torch.zeros(N), max_matvecs=60, seed=0)
    low, high = found.interval()
    assert low <= float(spectrum.sum()) <= high
    assert high - low < 1e-2


def test_probes_that_span_the_space_give_the_trace() -> None:
    matrix = symmetric(torch.linspace(1, 3, 30))
    found = hf.xnystrace(hf.dense(matrix), torch.zeros(30).double(), rtol=1e-9, seed=0)
    assert found.value == pytest.approx(60)
    low, high = found.interval()
    assert high - low < 1e-9
    assert found.matvecs == 30
    assert "whole space" in found.reason
    assert found.reason.startswith("converged")
