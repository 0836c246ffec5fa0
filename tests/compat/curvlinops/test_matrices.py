"""Curvature matrices of each loss against dense references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hessfunc.compat.curvlinops import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)
from tests.compat.curvlinops.problem import (
    LOSSES,
    Positions,
    batches,
    dense_empirical,
    dense_ggn,
    dense_hessian,
    matrix,
    net,
    whole,
)
from tests.reference import relative_error


@pytest.mark.parametrize("positions", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("kind", "dense"),
    [
        (HessianLinearOperator, dense_hessian),
        (GGNLinearOperator, dense_ggn),
        (EFLinearOperator, dense_empirical),
    ],
)
def test_matrices_of_uneven_batches_are_those_of_all_examples(
    kind: Any, dense: Any, name: str, positions: int | None
) -> None:
    loss = LOSSES[name]
    model = Positions() if positions and name.startswith("Cross") else net()
    data = batches(loss, positions=positions)
    A = kind(model, loss, list(model.parameters()), data)
    params = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(matrix(A), dense(model, loss, params, whole(data)))
    assert A.SELF_ADJOINT


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_of_fisher_matrices_is_the_gauss_newton_matrix(name: str) -> None:
    loss = LOSSES[name]
    model, data = net(), batches(loss)
    params = list(model.parameters())
    F = FisherMCLinearOperator(model, loss, params, data, mc_samples=4000)
    assert relative_error(matrix(F), matrix(GGNLinearOperator(model, loss, params, data))) < 0.06


def test_draws_depend_on_the_seed_and_not_on_the_order_of_batches() -> None:
    loss = LOSSES["CrossEntropyLoss mean"]
    model, data = net(), batches(loss)
    params = list(model.parameters())
    first = matrix(FisherMCLinearOperator(model, loss, params, data))
    torch.testing.assert_close(
        matrix(FisherMCLinearOperator(model, loss, params, data[::-1])), first
    )
    by_ggn = GGNLinearOperator(model, loss, params, data, mc_samples=1)
    torch.testing.assert_close(matrix(by_ggn), first)
    other = matrix(FisherMCLinearOperator(model, loss, params, data, seed=1))
    assert relative_error(other, first) > 0.1
