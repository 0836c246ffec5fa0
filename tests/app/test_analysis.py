"""The parts of an analysis, in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hessfunc.app.analysis import analyse
from hessfunc.app.problems.targets import Problem

D = torch.tensor([5.0, 3.0, 1.0, -2.0], dtype=torch.float64)
PROBLEM = Problem(
    loss=lambda params, batch: (params["x"].square() * D).sum() / 2 + 0 * batch.sum(),
    params={"x": torch.ones(4, dtype=torch.float64)},
    batches=[torch.zeros(3, 1), torch.zeros(1, 1)],
)


def parts(seen: list[tuple[str, float]] | None = None, **options: Any) -> dict[str, Any]:
    def on_part(name: str) -> Any:
        return lambda share, _: None if seen is None else seen.append((name, share))

    chosen: dict[str, Any] = {"k": 2, "points": 3, "checkpoint": None} | options
    found = analyse(
        PROBLEM,
        probes=1,
        steps=4,
        trace_rtol=0.05,
        max_matvecs=100,
        radius=0.5,
        seed=0,
        on_part=on_part,
        **chosen,
    )
    return {part.name: part.result for part in found}


def test_the_parts_of_a_diagonal_hessian() -> None:
    found = parts()
    assert list(found) == ["eigenvalues", "smallest", "trace", "density", "line", "plane"]
    assert found["eigenvalues"].values.tolist() == pytest.approx([5.0, 3.0])
    assert found["smallest"].values.tolist() == pytest.approx([-2.0])
    assert found["trace"].value == pytest.approx(7.0)
    assert found["density"].nodes[0].tolist() == pytest.approx(sorted(D.tolist()))
    # Along the first unit vector the loss is 3.5 + 5 (s + s^2 / 2) or its mirror image.
    steps = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    sign = found["eigenvalues"].vectors["x"][0, 0].sign()
    torch.testing.assert_close(found["line"].values, 3.5 + 5 * (sign * steps + steps.square() / 2))
    assert found["plane"].values.shape == (3, 3)


def test_a_plane_needs_two_vectors_and_a_landscape_points() -> None:
    assert "plane" not in parts(k=1)
    assert list(parts(points=0)) == ["eigenvalues", "smallest", "trace", "density"]


def test_each_part_ends_with_its_whole_share() -> None:
    seen: list[tuple[str, float]] = []
    names = list(parts(seen))
    assert list(dict.fromkeys(name for name, share in seen if share == 1.0)) == names
    assert all(0 <= share <= 1 for _, share in seen)


def test_parts_that_make_products_have_checkpoints(tmp_path: Path) -> None:
    first = parts(checkpoint=tmp_path)
    kept = {"eigenvalues", "smallest", "trace", "density"}
    assert {folder.name for folder in tmp_path.iterdir()} <= kept
    again = parts(checkpoint=tmp_path)
    assert torch.equal(first["density"].weights, again["density"].weights)
