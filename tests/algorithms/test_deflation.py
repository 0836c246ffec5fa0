from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.deflation import Deflation
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.span import Span
from hessfunc.spaces.of import space_of
from tests.reference.spectra import symmetric

N = 40
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
LIKE = {"a": torch.zeros(2, 7).double(), "b": torch.zeros(N - 14).double()}
SPACE = space_of(LIKE)
MATRICES = {
    "definite": symmetric(0.8**INDEX),
    "indefinite": symmetric(torch.linspace(-2, 1, N)),
    "repeated": symmetric(torch.where(INDEX <= 6, 1.0, 0.1)),
}
# Chains of two, one and two steps, and one more step of the first one.
STEPS = (0, 0, 1, 2, 2, 0)


def grown(
    matrix: Tensor, *, diagonal: bool, pairs: hf.results.Eigenpairs | None = None
) -> Deflation:
    """Three probes before the steps, and two more after them."""
    products, span = Products(hf.dense(matrix), SPACE), Span.of(SPACE, pairs, "start")
    state = Deflation.none(SPACE, 0, diagonal=diagonal).probed(products, span, 3, "signs")
    for chain in STEPS:
        state = state.extended(products, span, chain)
    state = state.probed(products, span, 2, "signs")
    assert products.matvecs == len(STEPS) + 5
    return state


def projection(*rows: Tensor) -> Tensor:
    basis = torch.cat(rows)
    return torch.eye(N).double() - basis.mT @ basis


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_all_parts_are_those_of_the_dense_matrix(name: str, diagonal: bool) -> None:
    matrix = MATRICES[name]
    state = grown(matrix, diagonal=diagonal)
    P = projection(state.basis)
    assert_close(state.basis @ state.basis.mT, torch.eye(len(STEPS)).double())
    assert_close(state.core, state.basis @ matrix @ state.basis.mT)
    assert_close(state.ends, state.basis[list(state.last)] @ matrix @ P)
    assert_close(state.images, state.probes @ P @ matrix @ P)
    deflated = (matrix - P @ matrix @ P).diagonal()
    assert_close(state.parts, torch.stack([deflated[:14].sum(), deflated[14:].sum()]))
    if diagonal:
        assert_close(state.probes.abs(), torch.ones(5, N).double())
        assert_close(state.unprojected, state.probes @ P @ matrix)
        assert_close(state.diagonal[0], deflated)
        assert_close(state.row_squares[0], (state.basis @ matrix).square().sum(0))
    else:
        assert_close(state.probes @ P, state.probes)


@pytest.mark.parametrize("name", ["definite", "repeated"])
def test_the_schur_complement_of_a_definite_matrix_is_sampled(name: str) -> None:
    matrix = MATRICES[name]
    state = grown(matrix, diagonal=False)
    products = matrix @ state.basis.mT
    schur = matrix - products @ torch.linalg.inv(state.core) @ products.mT
    images, weights = state.sampled(SPACE)
    assert_close(images, state.probes @ schur)
    total = state.parts.sum() + (weights * (state.ends @ state.ends.mT)).sum() + schur.trace()
    assert float(total) == pytest.approx(float(matrix.trace()), rel=1e-10)


@pytest.mark.parametrize("name", MATRICES)
def test_forms_of_the_probes_are_those_of_the_dense_matrix(name: str) -> None:
    matrix = MATRICES[name]
    state = grown(matrix, diagonal=False)
    products = matrix @ state.basis.mT
    P = projection(state.basis)
    B = S = P @ matrix @ P
    if name != "indefinite":
        S = matrix - products @ torch.linalg.inv(state.core) @ products.mT
    u, expected = state.probes, []
    for rows in (u @ B, u @ S):
        for entries in (u * rows, rows * rows):
            expected += [entries[:, :14].sum(1), entries[:, 14:].sum(1)]
    expected += [u.square().sum(1), (u @ (B - S)).square().sum(1)]
    assert_close(state.forms, torch.stack(expected, dim=1))
    trace = torch.stack([(B - S)[:14, :14].trace(), (B - S)[14:, 14:].trace()])
    assert_close(state.inner, trace)


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("name", MATRICES)
def test_a_vector_removes_what_is_certain(name: str, shift: float) -> None:
    matrix = MATRICES[name]
    products, span = Products(hf.dense(matrix), SPACE), Span.of(SPACE, None, "start")
    state, before = Deflation.none(SPACE, 0, diagonal=False), matrix - shift * torch.eye(N)
    for chain in STEPS:
        state = state.extended(products, span, chain)
        P = projection(state.basis)
        after = P @ (matrix - shift * torch.eye(N)) @ P
        if name != "indefinite":
            AQ = matrix @ state.basis.mT
            after = matrix - AQ @ torch.linalg.inv(state.core) @ AQ.mT - shift * P
        fall = float(before.square().sum() - after.square().sum())
        assert state.removed is not None
        curvature, coupled = state.removed
        assert (curvature - shift) ** 2 + coupled <= fall + 1e-10
        before = after


def test_an_indefinite_core_has_no_weights() -> None:
    state = grown(MATRICES["indefinite"], diagonal=False)
    assert float(torch.linalg.eigvalsh(state.core)[0]) < 0
    images, weights = state.sampled(SPACE)
    assert not weights.any()
    assert images is state.images


def test_eigenpairs_belong_to_the_basis() -> None:
    matrix = MATRICES["definite"]
    pairs = hf.lanczos(hf.dense(matrix), LIKE, k=3, rtol=1e-10, seed=0)
    vectors = SPACE.rows(pairs.vectors)
    state = grown(matrix, diagonal=False, pairs=pairs)
    P = projection(vectors, state.basis)
    assert_close(state.basis @ vectors.mT, torch.zeros(len(STEPS), 3).double())
    torch.testing.assert_close(state.images, state.probes @ P @ matrix @ P, rtol=0, atol=1e-8)


def test_an_invariant_chain_ends() -> None:
    span, products = Span.of(SPACE, None, "start"), Products(lambda block: block, SPACE)
    state = Deflation.none(SPACE, 0, diagonal=False).extended(products, span, 0)
    assert state.alive == ()
    assert len(state.ends) == 0
    state = state.extended(products, span, 1)
    assert len(state.basis) == 2
    assert float(state.parts.sum()) == pytest.approx(2)
