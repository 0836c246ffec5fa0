from __future__ import annotations

import math

import pytest
import torch

from hessfunc.algorithms.eigen.ritz import kept_by_restart, preferred, rayleigh_ritz, wanted


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


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("room", [4, 6, 19])
def test_a_restart_keeps_all_wanted_values_and_no_more_than_it_may(which: str, room: int) -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).double().sort().values
    indices = wanted(which, values, 4)
    for unconverged in (indices, indices[2:], indices[:0]):
        kept = kept_by_restart(values, indices, unconverged, room=room).tolist()
        assert set(indices.tolist()) <= set(kept)
        assert len(kept) == len(set(kept)) <= room


def test_a_restart_follows_the_best_gain_of_all_choices() -> None:
    values = torch.randn(15, generator=torch.Generator().manual_seed(1)).double().sort().values
    indices = wanted("SA", values, 3)
    kept = set(kept_by_restart(values, indices, indices[1:], room=12).tolist())

    def gain(low: int, high: int) -> float:
        first, last = float(values[low]), float(values[14 - high])
        ratio = abs(float(values[1]) - (first + last) / 2) / ((last - first) / 2)
        return (14 - low - high) * math.acosh(ratio)

    choices = [(low, high) for low in range(3, 13) for high in range(13 - low)]
    low, high = max(choices, key=lambda choice: gain(*choice))
    assert kept == {*range(low), *range(15 - high, 15)}
