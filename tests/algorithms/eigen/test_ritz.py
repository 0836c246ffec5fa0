from __future__ import annotations

import pytest
import torch

from hessfunc.algorithms.eigen.ritz import preferred, rayleigh_ritz, wanted


def test_ritz_pairs_diagonalise_the_symmetric_part_of_a_projected_matrix() -> None:
    projected = torch.randn(7, 7)
    values, coefficients = rayleigh_ritz(projected)
    symmetric = (projected.double() + projected.double().mT) / 2
    assert values.dtype == coefficients.dtype == torch.float64
    torch.testing.assert_close(values, torch.linalg.eigvalsh(symmetric))
    torch.testing.assert_close(symmetric @ coefficients, coefficients * values)
    torch.testing.assert_close(coefficients.mT @ coefficients, torch.eye(7).double())


@pytest.mark.parametrize(
    ("which", "order"),
    [
        ("LM", [-5.0, 4.0, -3.0, 2.0, 1.0]),
        ("LA", [4.0, 2.0, 1.0, -3.0, -5.0]),
        ("SA", [-5.0, -3.0, 1.0, 2.0, 4.0]),
        ("BE", [4.0, -5.0, 2.0, -3.0, 1.0]),
    ],
)
def test_order_in_which_eigenvalues_are_wanted(which: str, order: list[float]) -> None:
    values = torch.tensor([-5.0, -3.0, 1.0, 2.0, 4.0])
    assert values[preferred(which, values)].tolist() == order


def test_pairs_from_both_ends_are_reported_in_descending_order() -> None:
    values = torch.tensor([-5.0, -3.0, 1.0, 2.0, 4.0])
    assert values[wanted("BE", values, 3)].tolist() == [4.0, 2.0, -5.0]
    assert values[wanted("LM", values, 2)].tolist() == [-5.0, 4.0]
