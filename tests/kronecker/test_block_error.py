"""Measured errors of block-diagonal matrices, against dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.kronecker.cases import Net, dense, net


def case() -> Net:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    return net(make, 4, examples=6)


CASE = case()
BLOCKS = hf.kronecker.kflr(CASE.loss, CASE.model)(CASE.params, CASE.batch)
MATVEC = hf.ggnvp(CASE.loss)(CASE.params, CASE.batch)


def exact() -> tuple[float, float]:
    """The relative distance, and the share of the squared norm outside of the blocks."""
    whole = hf.matrix(MATVEC, CASE.params)
    sizes = [leaf.numel() for leaf in CASE.params.values()]
    rows = whole.split(sizes)
    inner = [row.split(sizes, 1)[i] for i, row in enumerate(rows)]
    near = torch.block_diag(*dense(BLOCKS).values())
    share = 1 - sum(float(block.square().sum()) for block in inner) / float(whole.square().sum())
    return float((whole - near).norm() / whole.norm()), share


def test_the_intervals_cover_the_exact_numbers() -> None:
    """Of 20 runs, each 95 % interval covers at least 15 times; 19 are expected."""
    distance, share = exact()
    runs = [hf.kronecker.error(BLOCKS, MATVEC, CASE.params, seed=seed) for seed in range(20)]
    for value, estimates in (
        (distance, [run.distance for run in runs]),
        (share, [run.off_diagonal for run in runs]),
    ):
        covered = [low <= value <= high for low, high in (each.interval() for each in estimates)]
        assert sum(covered) >= 15
        assert all(0 < each.stderr < 0.3 * value for each in estimates)


def test_many_probes_approach_the_exact_numbers() -> None:
    distance, share = exact()
    made = hf.kronecker.error(
        BLOCKS, MATVEC, CASE.params, rtol=0.01, max_matvecs=20_000, block_size=200, seed=0
    )
    assert made.reason.startswith("converged")
    assert made.matvecs < 20_000
    assert made.distance.value == pytest.approx(distance, rel=0.03)
    assert made.off_diagonal.value == pytest.approx(share, abs=4 * made.off_diagonal.stderr)


def test_blocks_have_no_distance_from_themselves() -> None:
    made = hf.kronecker.error(BLOCKS, BLOCKS, CASE.params, max_matvecs=8, seed=0)
    assert made.distance.value < 1e-12
    assert abs(made.off_diagonal.value) < 1e-12
    assert made.matvecs == 8


def test_a_run_is_saved_and_resumed(tmp_path: Path) -> None:
    options = {"seed": 3, "block_size": 2}
    whole = hf.kronecker.error(BLOCKS, MATVEC, CASE.params, max_matvecs=24, **options)
    stopped = hf.kronecker.error(
        BLOCKS,
        MATVEC,
        CASE.params,
        max_matvecs=24,
        checkpoint=tmp_path / "run",
        callback=lambda result: result.matvecs >= 8,
        **options,
    )
    assert stopped.matvecs == 8
    resumed = hf.kronecker.error(
        BLOCKS, MATVEC, CASE.params, max_matvecs=24, checkpoint=tmp_path / "run", **options
    )
    assert resumed.distance.value == whole.distance.value
    resumed.save(tmp_path / "error.npz")
    assert hf.load(tmp_path / "error.npz").off_diagonal.interval() == whole.off_diagonal.interval()
    assert "distance=" in repr(resumed)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="max_matvecs=3"):
        hf.kronecker.error(BLOCKS, MATVEC, CASE.params, max_matvecs=3)

    def zero(block: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(leaf) for name, leaf in block.items()}

    with pytest.raises(ValueError, match="the matrix is zero"):
        hf.kronecker.error(BLOCKS, zero, CASE.params, seed=0)
