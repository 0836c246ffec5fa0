from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms import offload as streamed
from hessfunc.algorithms.eigen import lanczos_state, thick_restart
from tests.algorithms.far import every_basis_is_far
from tests.reference.spectra import SPECTRUM, VECTOR, symmetric


def test_memory_chooses_the_size_of_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    matvec, vector = hf.dense(symmetric(SPECTRUM)), len(SPECTRUM) * 8
    small = hf.lanczos(matvec, VECTOR, k=3, basis_bytes=(6 + 1 + 3) * vector, seed=0)
    large = hf.lanczos(matvec, VECTOR, k=3, seed=0)
    torch.testing.assert_close(small.values, large.values)
    assert small.matvecs > large.matvecs
    with pytest.raises(MemoryError, match="a basis of 5 vectors of 186 entries .*fewer pairs"):
        hf.lanczos(matvec, VECTOR, k=3, basis_bytes=(4 + 1 + 3) * vector, seed=0)
    monkeypatch.setattr(lanczos_state, "available_to", lambda *_: 0)
    with pytest.raises(MemoryError, match="take fewer pairs"):
        hf.lanczos(matvec, VECTOR, k=3, seed=0)


def test_the_basis_never_exceeds_its_limit() -> None:
    states: list[int] = []
    vector = len(SPECTRUM) * 8
    real = thick_restart.block_step

    def watched(*arguments: object) -> object:
        state = real(*arguments)
        states.append(len(state.basis))
        return state

    thick_restart.block_step = watched
    try:
        hf.lanczos(
            hf.dense(symmetric(SPECTRUM)), VECTOR, k=3, basis_bytes=(8 + 1 + 3) * vector, seed=0
        )
    finally:
        thick_restart.block_step = real
    assert max(states) <= 8 + 1


def test_bytes_lower_a_given_basis_size() -> None:
    matvec, vector = hf.dense(symmetric(SPECTRUM)), len(SPECTRUM) * 8
    given = hf.lanczos(matvec, VECTOR, k=3, basis_size=8, seed=0)
    lowered = hf.lanczos(
        matvec, VECTOR, k=3, basis_size=80, basis_bytes=(8 + 1 + 3) * vector, seed=0
    )
    assert lowered.matvecs == given.matvecs


def test_bytes_of_a_basis_from_afar_are_those_of_the_basis_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matvec, vector = hf.dense(symmetric(SPECTRUM)), len(SPECTRUM) * 8
    given = hf.lanczos(matvec, VECTOR, k=3, basis_size=8, seed=0)
    with every_basis_is_far(piece=vector):
        lowered = hf.lanczos(
            matvec, VECTOR, k=3, basis_size=80, basis_bytes=(8 + 1) * vector, seed=0
        )
        assert lowered.matvecs == given.matvecs
        with pytest.raises(MemoryError, match="a basis of 5 vectors .*may be used"):
            hf.lanczos(matvec, VECTOR, k=3, basis_bytes=(4 + 1) * vector, seed=0)
        # Two pieces, a block and three pairs.
        monkeypatch.setattr(streamed, "available_to", lambda _: 2 * (2 + 1 + 3) * vector)
        hf.lanczos(matvec, VECTOR, k=3, seed=0)
        with pytest.raises(MemoryError, match="two pieces of a basis that is kept elsewhere"):
            hf.lanczos(matvec, VECTOR, k=4, seed=0)
