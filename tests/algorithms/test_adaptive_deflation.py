"""What the adaptive estimators of a trace and of a diagonal have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.adaptive_deflation import BLOCK
from hessfunc.algorithms.chains import Chains
from hessfunc.algorithms.deflation import PILOT
from tests.reference.spectra import symmetric

N = 60
LIKE = torch.zeros(N, dtype=torch.float64)
DECAY = symmetric(0.7 ** torch.arange(N, dtype=torch.float64))
FLAT = symmetric(torch.linspace(1, 1.1, N, dtype=torch.float64))
ESTIMATORS = pytest.mark.parametrize("estimator", [hf.trace, hf.diagonal])


def widths(estimator: Callable[..., Any], matrix: Tensor, **options: Any) -> list[int]:
    """Number of vectors in each call of the matvec."""
    seen: list[int] = []

    def matvec(block: Tensor) -> Tensor:
        seen.append(len(block))
        return block @ matrix

    estimator(matvec, LIKE, seed=0, **options)
    return seen


@ESTIMATORS
def test_krylov_vectors_follow_the_first_probes_where_they_pay(estimator: Any) -> None:
    found = widths(estimator, DECAY, max_matvecs=40)
    assert found[0] == PILOT
    assert found[1:6] == [1] * 5
    assert sum(found) == 40


@ESTIMATORS
def test_all_products_are_probes_where_no_vector_pays(estimator: Any) -> None:
    assert set(widths(estimator, FLAT, max_matvecs=24)) == {BLOCK}
    assert widths(estimator, FLAT, max_matvecs=24, block_size=10) == [PILOT, 10, 10]


@ESTIMATORS
def test_a_run_with_a_tolerance_ends_before_its_budget(estimator: Any) -> None:
    assert sum(widths(estimator, DECAY, rtol=0.1, max_matvecs=58)) < 40


@ESTIMATORS
def test_an_asymmetric_matvec_is_refused(estimator: Any) -> None:
    matrix = DECAY + torch.randn(N, N, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(ValueError, match="not symmetric"):
        estimator(lambda block: block @ matrix, LIKE, seed=0, max_matvecs=20)


@ESTIMATORS
def test_a_run_without_a_tolerance_decides_a_few_times_per_doubling_of_its_probes(
    estimator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions = 0
    choice = Chains.choice

    def counted(chains: Chains, *args: Any) -> int | None:
        nonlocal decisions
        decisions += 1
        return choice(chains, *args)

    monkeypatch.setattr(Chains, "choice", counted)
    matrix = symmetric(torch.linspace(1, 1.1, 300, dtype=torch.float64))
    like = torch.zeros(300, dtype=torch.float64)
    estimator(lambda block: block @ matrix, like, seed=0, max_matvecs=256)
    assert 12 <= decisions <= 24
