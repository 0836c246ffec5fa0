"""What cg and minres share: blocks whose columns are solved as if alone, starts, and options."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.results import Solution
from tests.reference.spectra import symmetric

Solve = Callable[..., Solution]
BOTH = pytest.mark.parametrize("solve", [hf.cg, hf.minres])

N = 60
DIAGONAL = torch.logspace(-2, 1, N).double()
LIKE = {"w": torch.zeros(4, 5).double(), "b": torch.zeros(N - 20).double()}
EASY = torch.zeros(N).double()
EASY[3] = 1.0
GENERATOR = torch.Generator().manual_seed(0)
HARD = torch.randn(N, generator=GENERATOR).double()
# Columns that take one step, many, none, and a moderate number.
COLUMNS = torch.stack([EASY, HARD, 0 * HARD, DIAGONAL * HARD])


class Counted:
    """Products with a diagonal matrix, whose rows do not depend on each other, and their number."""

    def __init__(self, diagonal: Tensor = DIAGONAL) -> None:
        self.diagonal, self.widths = diagonal, list[int]()

    def __call__(self, block: dict[str, Tensor]) -> dict[str, Tensor]:
        self.widths.append(len(block["b"]))
        scale = hf.unravel(self.diagonal, LIKE)
        return {name: leaf * scale[name] for name, leaf in block.items()}


def flat(tree: Any) -> Tensor:
    return torch.cat([tree["w"].flatten(-2), tree["b"]], dim=-1)


@BOTH
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_each_column_has_the_bits_of_its_own_run(
    solve: Solve, preconditioned: bool, warm: bool
) -> None:
    options: dict[str, Any] = {"rtol": 1e-8, "damping": 0.01}
    if preconditioned:
        options["preconditioner"] = Counted(1 / (DIAGONAL + 0.1))
    starts = 0.1 * COLUMNS + 0.01
    matvec = Counted()
    solution = solve(
        matvec,
        hf.unravel(COLUMNS, LIKE),
        like=LIKE,
        start=hf.unravel(starts, LIKE) if warm else None,
        **options,
    )
    alone = [
        solve(
            Counted(),
            hf.unravel(b, LIKE),
            start=hf.unravel(start, LIKE) if warm else None,
            **options,
        )
        for b, start in zip(COLUMNS, starts, strict=True)
    ]
    assert solution.converged
    assert torch.equal(flat(solution.x), torch.stack([flat(each.x) for each in alone]))
    assert solution.residuals.tolist() == [each.residual for each in alone]
    assert solution.reasons == tuple(each.reason for each in alone)
    assert solution.reason == "converged: all 4 residuals are within their tolerances"
    # Products are made together, and none for a column that has converged.
    assert solution.matvecs == sum(matvec.widths) == sum(each.matvecs for each in alone)
    assert solution.passes == len(matvec.widths) == max(each.passes for each in alone)


@BOTH
def test_preconditioner_is_applied_to_all_columns_at_once(solve: Solve) -> None:
    preconditioner = Counted(1 / (DIAGONAL + 0.1))
    matvec = Counted()
    solve(matvec, hf.unravel(COLUMNS, LIKE), like=LIKE, preconditioner=preconditioner)
    assert max(preconditioner.widths) == 3
    assert len(preconditioner.widths) <= len(matvec.widths) + 2


@BOTH
def test_against_the_closed_form(solve: Solve) -> None:
    matrix = symmetric(torch.linspace(0.5, 20, 80))
    block = torch.randn(7, 80, generator=torch.Generator().manual_seed(3)).double()
    solution = solve(hf.dense(matrix), block, like=block[0], rtol=1e-11)
    torch.testing.assert_close(
        solution.x, torch.linalg.solve(matrix, block.mT).mT, rtol=0, atol=1e-9
    )
    residuals = (block - solution.x @ matrix).norm(dim=1)
    torch.testing.assert_close(solution.residuals, residuals, rtol=1e-6, atol=1e-15)


def test_columns_stop_for_their_own_reasons() -> None:
    diagonal = torch.linspace(1, 3, N).double()
    diagonal[0] = -2.0
    block = torch.stack([EASY, torch.ones(N).double(), 0 * HARD])
    solution = hf.cg(Counted(diagonal), hf.unravel(block, LIKE), like=LIKE)
    assert solution.solved.tolist() == [True, False, True]
    assert not solution.converged
    assert solution.reasons[0].startswith("converged")
    assert solution.reasons[1].startswith("negative curvature")
    assert solution.reasons[2].startswith("converged")
    assert solution.reason.startswith("2 of 3 columns converged; column 1: negative curvature")
    assert solution.negative_curvature is not None
    p = flat(solution.negative_curvature)
    assert float((p * diagonal) @ p) < -1e-3
    assert float(p.norm()) == pytest.approx(1)


def test_of_several_directions_the_one_of_least_curvature_is_kept() -> None:
    diagonal = torch.linspace(1, 3, N).double()
    diagonal[:2] = torch.tensor([-1.0, -5.0])
    units = torch.eye(N).double()[:2]
    solution = hf.cg(Counted(diagonal), hf.unravel(units, LIKE), like=LIKE)
    torch.testing.assert_close(flat(solution.negative_curvature).abs(), units[1])


@BOTH
@pytest.mark.parametrize("budget", range(4, 40))
@pytest.mark.parametrize("warm", [False, True])
def test_budget_is_kept_and_every_residual_is_measured(
    solve: Solve, budget: int, warm: bool
) -> None:
    matvec = Counted()
    solution = solve(
        matvec,
        hf.unravel(COLUMNS, LIKE),
        like=LIKE,
        rtol=1e-10,
        max_matvecs=budget,
        start=hf.unravel(0.1 * COLUMNS, LIKE) if warm else None,
    )
    assert sum(matvec.widths) == solution.matvecs <= budget
    assert budget - solution.matvecs <= 4
    measured = (COLUMNS - DIAGONAL * flat(solution.x)).norm(dim=1)
    torch.testing.assert_close(solution.residuals, measured, rtol=1e-6, atol=1e-12)
    assert solution.solved.tolist() == (measured <= 1e-10 * COLUMNS.norm(dim=1)).tolist()
    unsolved = [
        reason
        for reason, solved in zip(solution.reasons, solution.solved, strict=True)
        if not solved
    ]
    assert unsolved
    assert all(f"{budget} matvecs" in reason for reason in unsolved if solution.matvecs == budget)


@BOTH
def test_running_results_have_all_columns(solve: Solve) -> None:
    seen: list[Solution] = []

    def callback(running: Solution) -> bool:
        seen.append(running)
        return len(seen) == 3

    solution = solve(Counted(), hf.unravel(COLUMNS, LIKE), like=LIKE, rtol=1e-9, callback=callback)
    assert [len(running.reasons) for running in seen] == [4, 4, 4]
    assert seen[-1].reasons[0].startswith("converged")
    assert seen[-1].reasons[1] == "running"
    assert solution.reasons[1] == "stopped by the callback"
    assert solution.reason == "3 of 4 columns converged; column 1: stopped by the callback" or (
        "2 of 4" in solution.reason
    )


@BOTH
def test_an_asymmetric_matvec_is_refused_in_a_block_too(solve: Solve) -> None:
    matrix = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).double()
    matrix += 10 * torch.eye(30).double()
    block = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)).double()
    with pytest.raises(
        ValueError, match="the matvec is not symmetric, not linear or not deterministic"
    ):
        solve(lambda rows: rows @ matrix, block, like=block[0])


def test_a_block_of_scalars() -> None:
    # Without `like`, three scalars and one vector of three entries have the same shape.
    b = torch.tensor([1.0, 2.0, 3.0]).double()
    solution = hf.cg(lambda block: 4 * block, b, like=torch.tensor(0.0).double())
    assert solution.x.tolist() == pytest.approx([0.25, 0.5, 0.75])
    assert len(solution.reasons) == 3
    assert len(hf.cg(lambda block: 4 * block, b).reasons) == 1


def test_is_saved_and_loaded(tmp_path: Path) -> None:
    solution = hf.minres(Counted(), hf.unravel(COLUMNS, LIKE), like=LIKE)
    solution.save(tmp_path / "solution.npz")
    loaded = hf.load(tmp_path / "solution.npz")
    assert isinstance(loaded, Solution)
    assert loaded.reasons == solution.reasons
    assert torch.equal(loaded.residuals, solution.residuals)
    assert loaded.converged
    assert torch.equal(loaded.x["w"], solution.x["w"])
    assert "converged=4 of 4" in repr(loaded)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b": LIKE}, "has the shape of one vector"),
        ({"b": {"w": torch.zeros(0, 4, 5).double(), "b": torch.zeros(0, N - 20).double()}},
         "b is a block of no vectors"),
        ({"start": hf.unravel(COLUMNS[:2], LIKE)}, "start is a block of 2 vectors, and b a block"),
        ({"start": LIKE}, "has the shape of one vector"),
        ({"max_matvecs": 3}, "max_matvecs=3: it must be at least 4"),
        ({"like": {"w": LIKE["w"]}}, "structure"),
    ],
)  # fmt: skip
def test_bad_options(solve: Solve, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(**{"matvec": Counted(), "b": hf.unravel(COLUMNS, LIKE), "like": LIKE, **options})


# A single right-hand side: cg on a definite matrix, minres on an indefinite one.

SPECTRUM = torch.logspace(-1, 1, 80).double()
SIGNS = torch.tensor([1.0, -1.0]).double().repeat(40)
ONE = pytest.mark.parametrize(
    ("solve", "matrix"),
    [(hf.cg, symmetric(SPECTRUM)), (hf.minres, symmetric(SIGNS * SPECTRUM))],
    ids=["cg", "minres"],
)
B = torch.randn(80, generator=torch.Generator().manual_seed(1)).double()


@ONE
def test_trees_of_several_leaves(solve: Solve, matrix: Tensor) -> None:
    b = {"a": B[:12].reshape(3, 4), "c": [B[12:13].squeeze(0), B[13:]]}
    x = solve(hf.dense(matrix), b, rtol=1e-12).x
    torch.testing.assert_close(hf.ravel(x), torch.linalg.solve(matrix, B), atol=1e-8, rtol=0)
    assert x["a"].shape == (3, 4)
    assert x["c"][0].shape == ()


@ONE
def test_start_at_the_solution_costs_one_product(solve: Solve, matrix: Tensor) -> None:
    x = torch.linalg.solve(matrix, B)
    solution = solve(hf.dense(matrix), B, start=x)
    assert solution.matvecs == 1
    assert solution.converged
    torch.testing.assert_close(solution.x, x)


@ONE
def test_start_near_the_solution_takes_fewer_products(solve: Solve, matrix: Tensor) -> None:
    near = torch.linalg.solve(matrix, B) + 1e-3 * B
    warm = solve(hf.dense(matrix), B, start=near, rtol=1e-6)
    assert warm.converged
    assert warm.matvecs < solve(hf.dense(matrix), B, rtol=1e-6).matvecs


@ONE
def test_zero_b_takes_no_product(solve: Solve, matrix: Tensor) -> None:
    solution = solve(hf.dense(matrix), torch.zeros_like(B), start=B)
    assert solution.matvecs == 0
    assert solution.converged
    assert solution.residual == 0
    assert not solution.x.any()


@ONE
def test_float32_reaches_a_tolerance_that_its_rounding_allows(solve: Solve, matrix: Tensor) -> None:
    solution = solve(hf.dense(matrix.float()), B.float(), rtol=1e-4)
    assert solution.converged
    assert solution.x.dtype == torch.float32
    error = B.float().double() - matrix.float().double() @ solution.x.double()
    assert error.norm() <= 1.1e-4 * B.norm()


@ONE
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b": {"u": B, "w": B * math.inf}}, "b has entries that are NaN or infinite, at w"),
        ({"start": B * math.nan}, "start has entries that are NaN or infinite, at params"),
        ({"start": torch.ones(3)}, "shape"),
        ({"start": {"w": B}}, "structure"),
        ({"rtol": -1.0}, "rtol=-1.0: it must be at least 0"),
        ({"atol": -1.0}, "atol=-1.0: it must be at least 0"),
        ({"max_matvecs": 0}, "max_matvecs=0: it must be at least 1"),
        ({"damping": math.nan}, "damping=nan: it must be finite"),
        ({"damping": math.inf}, "damping=inf: it must be finite"),
    ],
)
def test_bad_options_of_one_right_hand_side(
    solve: Solve, matrix: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solve(**{"matvec": hf.dense(matrix), "b": B, **options})


@ONE
@pytest.mark.parametrize("signs", [-torch.ones(80), torch.zeros(80), torch.arange(80.0) - 60])
def test_preconditioner_that_is_not_positive_is_refused(
    solve: Solve, matrix: Tensor, signs: Tensor
) -> None:
    with pytest.raises(ValueError, match="the preconditioner is not positive definite: r'Mr = "):
        solve(hf.dense(matrix), B, preconditioner=lambda block: block * signs)


@ONE
def test_starts_again_where_the_recurrence_has_drifted(solve: Solve, matrix: Tensor) -> None:
    # Products that are rounded to 1e-3 of their length, but exact for short vectors.
    drift = symmetric(torch.randn(80, generator=torch.Generator().manual_seed(3)), seed=5)
    calls = []

    def matvec(block: Tensor) -> Tensor:
        calls.append(block)
        wrong = 1e-3 * block @ drift if len(calls) == 3 else 0.0
        return block @ matrix + wrong

    solution = solve(matvec, B, rtol=1e-8)
    assert solution.converged
    assert (B - solution.x @ matrix).norm() <= 1.01e-8 * B.norm()
    assert solution.matvecs > solve(hf.dense(matrix), B, rtol=1e-8).matvecs


@ONE
@pytest.mark.parametrize("budget", range(1, 14))
@pytest.mark.parametrize("warm", [False, True])
def test_budget_is_kept_and_the_residual_measured_within_it(
    solve: Solve, matrix: Tensor, budget: int, warm: bool
) -> None:
    widths = []

    def matvec(block: Tensor) -> Tensor:
        widths.append(len(block))
        return block @ matrix

    solution = solve(matvec, B, max_matvecs=budget, start=0.1 * B if warm else None)
    assert sum(widths) == solution.matvecs <= budget
    assert budget - solution.matvecs <= 1
    assert not solution.converged
    assert f"{budget} matvecs" in solution.reason or "than the 1 matvecs" in solution.reason
    assert solution.residual == pytest.approx(float((B - solution.x @ matrix).norm()), rel=1e-9)
