"""Scores of training examples for themselves, against pairwise scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hessfunc as hf
from tests.distributed import problems
from tests.distributed.ranks import Ranks
from tests.recipes.influence.problem import (
    DAMPING,
    LOSS,
    MODEL,
    PARAMS,
    TRAIN,
    X,
    Y,
    gauss_newton,
    gradients,
    scores,
)


@pytest.mark.parametrize("examples_per_chunk", [None, 1, 5])
def test_scores_are_the_diagonal_of_the_dense_formula(examples_per_chunk: int | None) -> None:
    found = hf.self_influence(
        LOSS, PARAMS, TRAIN, damping=DAMPING, rtol=1e-11, examples_per_chunk=examples_per_chunk
    )
    rows = gradients(X, Y)
    torch.testing.assert_close(
        found.scores, scores(gauss_newton(), rows, rows).diagonal(), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(found.norms, rows.norm(dim=1))
    assert found.converged
    assert len(found.residuals) == len(X)


def test_kronecker_factors_take_no_iterations(tmp_path: Path) -> None:
    curvature = hf.kronecker.ekfac(LOSS, MODEL)
    found = hf.self_influence(LOSS, PARAMS, TRAIN, damping=DAMPING, curvature=curvature)
    pairs = hf.influence(LOSS, PARAMS, TRAIN, TRAIN, damping=DAMPING, curvature=curvature)
    torch.testing.assert_close(found.scores, pairs.scores.diagonal(), rtol=1e-10, atol=0.0)
    assert found.matvecs == len(X)
    found.save(tmp_path / "own.npz")
    assert torch.equal(hf.load(tmp_path / "own.npz").scores, found.scores)


def test_a_set_without_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training example"):
        hf.self_influence(LOSS, PARAMS, [], damping=DAMPING, curvature=lambda block: block)


def test_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    batches = [(X[:4], Y[:4]), (X[4:9], Y[4:9]), (X[9:], Y[9:])]
    options: dict[str, Any] = {"damping": DAMPING, "rtol": 1e-10, "curvature": hf.ggnvp(LOSS)}
    whole = hf.self_influence(LOSS, PARAMS, batches, **options)

    def stop(progress: Any) -> None:
        if progress.task == "self_influence" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.self_influence(LOSS, PARAMS, batches, checkpoint=tmp_path, progress=stop, **options)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["batch-000000.npz", "batch-000001.npz"]
    seen: list[int] = []

    def counted(params: Any, batch: Any) -> Any:
        seen.append(len(batch[1]))
        return LOSS(params, batch)

    resumed = hf.self_influence(counted, PARAMS, batches, checkpoint=tmp_path, **options)
    # Only the gradients of the last batch are computed.
    assert len(seen) == 1
    assert torch.equal(resumed.scores, whole.scores)
    assert torch.equal(resumed.residuals, whole.residuals)
    assert (resumed.matvecs, resumed.reason) == (whole.matvecs, whole.reason)


@pytest.mark.parametrize(
    "other",
    [
        {"damping": 0.25},
        {"curvature": hf.hvp(LOSS)},
        {"curvature": hf.kronecker.kfac(LOSS, MODEL, samples=2, seed=0)},
        {"train_batches": TRAIN[::-1]},
        {"params": {name: 2 * leaf for name, leaf in PARAMS.items()}},
    ],
)
def test_a_checkpoint_of_other_arguments_is_refused(tmp_path: Path, other: Any) -> None:
    def run(params: Any = PARAMS, train_batches: Any = TRAIN, **options: Any) -> None:
        options = {"damping": DAMPING, "curvature": hf.ggnvp(LOSS)} | options
        hf.self_influence(LOSS, params, train_batches, checkpoint=tmp_path, **options)

    run()
    with pytest.raises(ValueError, match="batch-000000.npz was computed from other"):
        run(**other)


def divided_scores(folder: str, curvature: str) -> tuple[float, int]:
    """The error of scores on a mesh, and the number of batches that this rank differentiates."""
    loss, params = problems.model_and_loss()
    batches, calls = problems.batches()[:3], []
    options: dict[str, Any] = {"damping": DAMPING, "rtol": 1e-8}
    matrix = hf.over_batches(problems.curvature(curvature))(params, batches)
    whole = hf.self_influence(loss, params, batches, curvature=matrix, **options)

    def seen(params: Any, batch: Any) -> Any:
        calls.append(1)
        return loss(params, batch)

    options |= {
        "curvature": problems.curvature(curvature),
        "mesh": problems.mesh(2, names=("data",)),
        "checkpoint": folder,
    }
    divided = hf.self_influence(seen, params, batches, **options)
    again = hf.self_influence(loss, params, batches, **options)
    assert torch.equal(again.scores, divided.scores)
    return float((divided.scores - whole.scores).abs().max()), len(calls)


@pytest.mark.parametrize(("curvature", "batches"), [("ekfac", [1, 2]), ("ggnvp", [3, 3])])
def test_ranks_divide_the_work(
    two: Ranks, tmp_path: Path, curvature: str, batches: list[int]
) -> None:
    """Three batches: inverted on the ranks that own them, or solved by all ranks together."""
    errors, counts = zip(*two.run(divided_scores, str(tmp_path), curvature), strict=True)
    assert max(errors) < 1e-6
    assert sorted(counts) == batches
