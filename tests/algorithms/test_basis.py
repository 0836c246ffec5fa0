from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from hessfunc.algorithms import basis as bases
from hessfunc.algorithms.basis import Basis, orthonormal, project_out
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from tests.algorithms.far import counted_copies, every_basis_is_far
from tests.reference.spectra import orthogonal

N = 5000
SPACE = space_of(torch.zeros(N))


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_PIECE", 2**13)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def orthonormal_rows(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(N, count, seed=seed)).Q.mT.contiguous().to(dtype)


@pytest.mark.parametrize("shape", [(7,), (2, 7)])
def test_rows_are_appended_in_place_and_what_is_before_stays(shape: tuple[int, ...]) -> None:
    rows = normal(6, *shape)
    basis = Basis(rows[:0]).append(rows[:1], 4).rows
    one = basis
    for i in range(1, 4):
        basis = Basis(basis).append(rows[i : i + 1], 4).rows
    assert basis.data_ptr() == one.data_ptr()
    assert torch.equal(one, rows[:1])
    assert torch.equal(basis, rows[:4])
    longer = Basis(basis).append(rows[4:], 4).rows
    assert longer.data_ptr() != basis.data_ptr()
    assert torch.equal(longer, rows)
    assert torch.equal(basis, rows[:4])


def test_a_basis_that_was_read_back_gets_a_workspace() -> None:
    rows = normal(3, 7)
    basis = Basis(rows[:2].clone()).append(rows[2:], 9).rows
    assert torch.equal(basis, rows)
    assert basis.untyped_storage().nbytes() == 9 * 7 * 8


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-3)]
)
def test_parts_along_a_basis_are_removed(dtype: torch.dtype, error: float) -> None:
    working = torch.promote_types(dtype, torch.float32)
    basis, before = orthonormal_rows(9, dtype), normal(2, N, seed=1).to(working)
    rows = before.clone()
    inner = project_out(SPACE, rows, Basis(basis[:4]), Basis(basis[4:]))
    torch.testing.assert_close(inner, before.double() @ basis.double().mT, rtol=1e-6, atol=1e-5)
    again = Basis(basis).combine(SPACE, inner, working) + rows
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)
    assert float((rows.double() @ basis.double().mT).abs().max()) < error * float(before.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_basis_is_rotated_in_its_own_memory(dtype: torch.dtype) -> None:
    working = torch.promote_types(dtype, torch.float32)
    basis, rotation = orthonormal_rows(9, dtype), orthogonal(9)[:, :4]
    expected = Basis(basis).combine(SPACE, rotation.mT, working)
    found = Basis(basis).rotate(SPACE, rotation, working).rows
    assert found.data_ptr() == basis.data_ptr()
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found.to(working), expected, **tolerance)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
def test_nearly_dependent_rows_become_orthonormal(smallest: float, scale: float) -> None:
    basis, basics = orthonormal_rows(6), orthonormal_rows(3, seed=1)
    uneven = torch.tensor([1.0, 0.5, smallest])[:, None] * basics
    given = scale * (orthogonal(3).float() @ uneven + 1e3 * normal(3, 6, seed=2).float() @ basis)
    rows, factor, inner = orthonormal(SPACE, given.clone(), Basis(basis), threshold=lambda _: 0.0)
    both = torch.cat([rows, basis]).double()
    torch.testing.assert_close(both @ both.mT, torch.eye(9).double(), rtol=0, atol=2e-6)
    again = factor.mT @ rows.double() + inner @ basis.double()
    assert float((again - given).norm()) < 1e-6 * float(given.norm())


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("error", [0.0, 1e-3, 1.0, 1e3])
def test_any_prediction_gives_orthonormal_rows(error: float, far: bool) -> None:
    basis, outside = orthonormal_rows(6), orthonormal_rows(2, seed=1)
    # Only the last three coefficients are predicted.
    inner = torch.cat([torch.zeros(2, 3), 10 * normal(2, 3, seed=2)], dim=1).float()
    given = inner @ basis + outside
    predicted = inner[:, 3:].double() + error * normal(2, 3, seed=3)
    with every_basis_is_far(16 * N) if far else nullcontext():
        rows, factor, found = orthonormal(
            SPACE, given.clone(), Basis(basis), threshold=lambda _: 0.0, predicted=predicted
        )
    both = torch.cat([rows, basis]).double()
    torch.testing.assert_close(both @ both.mT, torch.eye(8).double(), rtol=0, atol=2e-6)
    again = factor.mT @ rows.double() + found @ basis.double()
    assert float((again - given).norm()) < 1e-6 * (1 + error) * float(given.norm())


def test_directions_below_the_threshold_are_left_out() -> None:
    basis, basics = orthonormal_rows(6), orthonormal_rows(2, seed=1)
    given = torch.stack([basics[0], basics[0] + 1e-5 * basics[1], 3 * basis[0]])
    lengths: list[float] = []

    def threshold(longest: float) -> float:
        lengths.append(longest)
        return 1e-3

    rows, factor, inner = orthonormal(SPACE, given.clone(), Basis(basis), threshold=threshold)
    assert lengths == pytest.approx([3])
    assert len(rows) == 1
    again = factor.mT @ rows.double() + inner @ basis.double()
    assert float((again - given).norm()) < 1e-4
    none, _, _ = orthonormal(SPACE, basis[:2].clone(), Basis(basis), threshold=lambda _: 1e-5)
    assert none.shape == (0, N)


# Bytes of a piece: one row, a few with a rest, all of the basis.
PIECES = [1, 16 * N, 2**22]
PRECISION = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-3}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("dtype", PRECISION)
def test_parts_along_a_basis_from_afar_are_removed_as_well(dtype: torch.dtype, piece: int) -> None:
    working = torch.promote_types(dtype, torch.float32)
    basis, before = orthonormal_rows(9, dtype), normal(2, N, seed=1).to(working)
    near, far = before.clone(), before.clone()
    expected = project_out(SPACE, near, Basis(basis))
    with every_basis_is_far(piece), counted_copies() as copies:
        inner = project_out(SPACE, far, Basis(basis[:4]), Basis(basis[4:]))
    # Each row is brought once.
    assert sum(copies) == 9 * N * dtype.itemsize
    torch.testing.assert_close(inner, expected, rtol=1e-6, atol=1e2 * PRECISION[dtype])
    left = [float((rows.double() @ basis.double().mT).norm()) for rows in (near, far)]
    assert left[1] < 1.5 * left[0] + 1e-15 * float(before.norm())
    again = Basis(basis).combine(SPACE, inner, working) + far
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("dtype", PRECISION)
def test_a_basis_from_afar_is_combined_and_rotated(dtype: torch.dtype, piece: int) -> None:
    working = torch.promote_types(dtype, torch.float32)
    basis, rotation = orthonormal_rows(9, dtype), orthogonal(9)[:, :4]
    kept = basis.clone()
    expected = Basis(basis.clone()).rotate(SPACE, rotation, working).rows
    with every_basis_is_far(piece):
        combination = Basis(kept).combine(SPACE, rotation.mT, working)
        found = Basis(kept).rotate(SPACE, rotation, working).rows
    assert found.data_ptr() == kept.data_ptr()
    assert torch.equal(kept[4:], basis[4:])
    tolerance = {"rtol": 2**-7, "atol": 1e-4} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **tolerance)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.float64 else {}
    torch.testing.assert_close(
        combination, Basis(basis).combine(SPACE, rotation.mT, working), **tolerance
    )


@pytest.mark.parametrize("piece", PIECES)
def test_many_rows_are_orthonormal_to_rounding_wherever_the_basis_is(piece: int) -> None:
    # Each row is nearly that before it: what Gram-Schmidt in one pass loses is lost here.
    step = 1e-3 * normal(40, N, seed=3).float()
    errors = []
    for far in (False, True):
        with every_basis_is_far(piece) if far else nullcontext():
            basis = (
                Basis(torch.empty(0, N)).append(torch.nn.functional.normalize(step[:1]), 40).rows
            )
            for row in step[1:]:
                given = basis[-1:] + row
                block, _, _ = orthonormal(SPACE, given, Basis(basis), threshold=lambda _: 0.0)
                basis = Basis(basis).append(block, 40).rows
        gram = basis.double() @ basis.double().mT
        errors.append(float((gram - torch.eye(40).double()).abs().max()))
    assert errors[0] < 1e-6
    assert errors[1] < 1e-6


def test_ranks_add_up_once_whatever_they_convert_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 2**13 // 9 + 1
    sums: list[torch.Size] = []

    def watched(space: Space, numbers: Tensor) -> Tensor:
        sums.append(numbers.shape)
        return numbers

    monkeypatch.setattr(Space, "summed", watched)
    basis = orthonormal_rows(9, torch.bfloat16)[:, : 2 * piece]
    project_out(space_of(torch.zeros(2 * piece)), normal(2, 2 * piece).float(), Basis(basis))
    assert sums == [(2, 9)]
