"""Passes over the training examples: resumed from a checkpoint, and divided among ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hessfunc as hf
from tests.distributed import problems
from tests.distributed.ranks import Ranks
from tests.recipes.influence.problem import LOSS, PARAMS, QUERIES, TRAIN, X, Y


def test_an_interrupted_pass_is_resumed(tmp_path: Path) -> None:
    folder, batches = tmp_path / "run", [(X[:4], Y[:4]), (X[4:9], Y[4:9]), (X[9:], Y[9:])]
    options: dict[str, Any] = {"damping": 0.5, "rtol": 1e-10, "curvature": hf.ggnvp(LOSS)}
    whole = hf.influence(LOSS, PARAMS, batches, QUERIES, by_leaf=True, **options)
    ended: list[int] = []

    def stop(progress: Any) -> None:
        if progress.task == "influence" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.influence(LOSS, PARAMS, batches, QUERIES, checkpoint=folder, progress=stop, **options)
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["batch-000000.npz", "batch-000001.npz", "queries.npz"]

    def seen(params: Any, batch: Any) -> Any:
        ended.append(len(batch[1]))
        return LOSS(params, batch)

    resumed = hf.influence(
        seen, PARAMS, batches, QUERIES, checkpoint=folder, by_leaf=True, **options
    )
    # Only the gradients of the last batch are computed, and no system is solved.
    assert len(ended) == 1
    assert torch.equal(resumed.scores, whole.scores)
    assert resumed.matvecs == whole.matvecs
    assert torch.equal(resumed.residuals, whole.residuals)


def test_checkpoints_of_other_arguments_are_refused(tmp_path: Path) -> None:
    hf.influence(LOSS, PARAMS, TRAIN, QUERIES, damping=0.5, checkpoint=tmp_path)
    for queries, damping in ((TRAIN, 0.5), (QUERIES, 0.25)):
        with pytest.raises(ValueError, match="queries.npz was computed from other"):
            hf.influence(LOSS, PARAMS, TRAIN, queries, damping=damping, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="batch-000000.npz was computed from other"):
        hf.influence(LOSS, PARAMS, TRAIN[::-1], QUERIES, damping=0.5, checkpoint=tmp_path)


def divided_scores(folder: str, curvature: str) -> tuple[float, int]:
    """The error of scores on a mesh, and the number of gradients that this rank computes."""
    loss, params = problems.model_and_loss()
    batches, calls = problems.batches(), []
    mesh = problems.mesh(2, names=("data",))
    options: dict[str, Any] = {"damping": 0.5, "rtol": 1e-11}
    matrix = hf.over_batches(problems.curvature(curvature))(params, batches)
    whole = hf.influence(loss, params, batches, batches[:2], curvature=matrix, **options)

    def seen(params: Any, batch: Any) -> Any:
        calls.append(1)
        return loss(params, batch)

    divided = hf.influence(
        seen,
        params,
        batches,
        batches[:2],
        curvature=problems.curvature(curvature),
        query_loss=loss,
        mesh=mesh,
        checkpoint=folder,
        **options,
    )
    again = hf.influence(
        loss, params, batches, batches[:2], curvature=problems.curvature(curvature), mesh=mesh,
        checkpoint=folder, **options,
    )  # fmt: skip
    assert torch.equal(again.scores, divided.scores)
    return float((divided.scores - whole.scores).abs().max()), len(calls)


@pytest.mark.parametrize("curvature", ["ggnvp", "ekfac"])
def test_ranks_divide_the_training_batches(two: Ranks, tmp_path: Path, curvature: str) -> None:
    errors, counts = zip(*two.run(divided_scores, str(tmp_path), curvature), strict=True)
    assert max(errors) < 1e-9
    # Seven batches, each differentiated on one rank.
    assert sorted(counts) == [3, 4]
