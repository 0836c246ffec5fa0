from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms import offload as streamed
from hessfunc.algorithms.eigen import thick_restart
from hessfunc.memory import Footprint
from tests.algorithms.far import copies_are_late, counted_copies, every_basis_is_far
from tests.reference.spectra import SPECTRUM, VECTOR, symmetric


def test_the_basis_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces: set[int] = set()
    real = thick_restart.block_step

    def watched(*arguments: Any) -> Any:
        state = real(*arguments)
        workspaces.add(state.basis.rows.data_ptr())
        return state

    monkeypatch.setattr(thick_restart, "block_step", watched)
    options: dict[str, Any] = {"k": 3, "basis_size": 8, "rtol": 1e-10}
    found = hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, seed=0, **options)
    assert found.matvecs > 2 * 8
    assert len(workspaces) == 1


def test_a_basis_of_300_float32_vectors_is_orthonormal() -> None:
    n = 3000
    spectrum = torch.cat([0.9 ** torch.arange(100.0) * 100, torch.linspace(-1, 1, n - 100)])
    found = hf.lanczos(
        lambda v: v * spectrum, torch.zeros(n), k=300, basis_size=310, max_matvecs=620, seed=0
    )
    gram = found.vectors.double() @ found.vectors.double().mT
    assert float((gram - torch.eye(300)).abs().max()) < 1e-5


# Of 298 copies of zero not all four that are wanted need be met, and then the run warns.
@pytest.mark.filterwarnings("ignore:converged.*outside of the basis")
@pytest.mark.parametrize("seed", range(10))
def test_a_restart_that_keeps_zeros_alone_remembers_the_scale(seed: int) -> None:
    spectrum = torch.cat([torch.tensor([1000.0, 500.0]), torch.zeros(298)])
    matrix = symmetric(spectrum)
    like, options = torch.zeros(300).double(), {"which": "SA", "block_size": 2, "basis_size": 8}
    found = hf.lanczos(hf.dense(matrix), like, k=4, seed=seed, **options)
    assert found.largest == pytest.approx(1000, rel=0.1)
    assert bool((found.values[:2].abs() < 1e-9).all())


RUNS: dict[str, dict[str, Any]] = {
    "one vector": {"k": 5},
    "blocks": {"k": 4, "block_size": 3, "which": "BE"},
    "restarts": {"k": 3, "basis_size": 8, "rtol": 1e-8},
    "restarts of blocks": {"k": 3, "block_size": 2, "basis_size": 11, "rtol": 1e-8},
    "restarts within a round": {"k": 9, "basis_size": 41},
    "to its end": {"k": 186},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_basis_from_afar_gives_the_same_pairs(name: str) -> None:
    matvec, options = hf.dense(symmetric(SPECTRUM)), RUNS[name]
    expected = hf.lanczos(matvec, VECTOR, seed=0, **options)
    with every_basis_is_far(), counted_copies() as copies:
        found = hf.lanczos(matvec, VECTOR, seed=0, **options)
    assert copies
    # Pieces are added up in another order, which may move the last round by one.
    assert found.matvecs == pytest.approx(expected.matvecs, rel=0.15)
    assert found.reason == expected.reason
    # Of two values of one size either may come first.
    for mine, his in ((found.values, expected.values), (found.residuals, expected.residuals)):
        torch.testing.assert_close(mine.sort()[0], his.sort()[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["one vector", "blocks", "restarts of blocks", "restarts within a round"]
)
def test_copies_that_come_late_are_waited_for(name: str, tmp_path: Path) -> None:
    matvec, options = hf.dense(symmetric(SPECTRUM)), RUNS[name] | {"seed": 0}
    with every_basis_is_far():
        expected = hf.lanczos(matvec, VECTOR, **options)
        with copies_are_late():
            found = hf.lanczos(matvec, VECTOR, **options)
            hf.lanczos(
                matvec, VECTOR, checkpoint=tmp_path, callback=lambda running: True, **options
            )
        again = hf.lanczos(matvec, VECTOR, checkpoint=tmp_path, **options)
    assert torch.equal(found.vectors, expected.vectors)
    assert torch.equal(found.residuals, expected.residuals)
    # From a state that was stored in the middle.
    assert torch.equal(again.vectors, expected.vectors)


def test_a_step_brings_the_basis_once_and_no_more_than_two_pieces() -> None:
    n, m, piece = 20_000, 50, 10 * 20_000 * 4
    spectrum, like = torch.linspace(-1, 1, n), torch.zeros(n)
    options = {"k": 1, "basis_size": m + 1, "max_matvecs": m + 1, "rtol": 0.0, "seed": 0}
    peaks = []
    for far in (False, True):
        where = every_basis_is_far(piece) if far else nullcontext()
        with where, counted_copies() as copies, Footprint() as memory:
            hf.lanczos(lambda block: block * spectrum, like, **options)
        peaks.append(memory.peak)
    # A step brings the last two vectors again. A look at the pairs reads the basis once more, which
    # is seldom.
    once = sum(range(1, m + 1)) * n * 4
    assert once < sum(copies) < 1.25 * once
    # The inner products of a few rows are made of copies in float64.
    assert peaks[1] - peaks[0] <= 2 * piece + 5 * n * 8


def test_a_basis_that_is_kept_where_the_vectors_are_is_not_copied() -> None:
    matvec = hf.dense(symmetric(SPECTRUM))
    expected = hf.lanczos(matvec, VECTOR, k=3, seed=0)
    with counted_copies() as copies:
        found = hf.lanczos(matvec, VECTOR, k=3, basis_device="cpu", seed=0)
    assert not copies
    assert torch.equal(found.vectors, expected.vectors)


def reflected(n: int, device: str) -> tuple[hf.trees.Matvec, Tensor]:
    """A matrix of known spectrum whose eigenvectors have all entries, and a vector."""
    like = torch.zeros(n, dtype=torch.float64, device=device)
    spectrum = torch.linspace(-1, 1, n, dtype=torch.float64, device=device)
    spectrum[:5] = torch.tensor([9.0, -7.0, 5.0, -4.0, 3.0])
    axis = hf.random_like(like, 1, kind="normal", seed=7)[0]
    axis /= axis.norm()

    def matvec(block: Tensor) -> Tensor:
        block = block - 2 * (block @ axis)[:, None] * axis
        block = block * spectrum
        return block - 2 * (block @ axis)[:, None] * axis

    return matvec, like


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_basis_of_a_gpu_in_the_memory_of_the_host(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m, piece = 2**20, 60, 2**23
    monkeypatch.setattr(streamed, "_PIECE", piece)
    matvec, like = reflected(n, "cuda")
    rtol = 1e-12 if dtype == torch.float64 else 1e-2
    options = {"k": 5, "rtol": rtol, "basis_dtype": dtype, "max_matvecs": 150, "seed": 0}
    found, peaks = [], []
    for device in (None, "cpu"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(hf.lanczos(matvec, like, basis_size=m, basis_device=device, **options))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    on_gpu, on_host = found
    error = 1e-10 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(on_host.values, on_gpu.values, rtol=error, atol=0)
    assert on_host.vectors.is_cuda
    # Two pieces, and the copy of one in float32.
    assert peaks[0] - peaks[1] > 0.8 * (m * n * dtype.itemsize - 4 * piece)


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [(None, "cpu"), ("cpu", "cpu"), ("cpu", None)])
@pytest.mark.parametrize("stop", [2, 30])
def test_a_run_goes_on_with_the_basis_elsewhere(
    devices: tuple[str | None, str | None], stop: int, tmp_path: Path
) -> None:
    matvec, like = reflected(2**16, "cuda")
    options = {"k": 5, "basis_size": 20, "rtol": 1e-11, "seed": 0}
    expected = hf.lanczos(matvec, like, **options)
    for device, rounds in zip(devices, (stop, 1000), strict=True):
        seen: list[int] = []

        def stopped(
            running: hf.results.Eigenpairs, seen: list[int] = seen, rounds: int = rounds
        ) -> bool:
            seen.append(running.matvecs)
            return len(seen) == rounds

        found = hf.lanczos(
            matvec, like, basis_device=device, checkpoint=tmp_path, callback=stopped, **options
        )
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=0)
