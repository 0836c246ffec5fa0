"""Runs of a user's training in a folder."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessfunc.app.report import Invocation
from hessfunc.app.tracked import Track, TrackedRun
from hessfunc.tracking import read

RUN = Invocation("hessfunc track mine:training", 0, "2026-01-01")
BATCHES = [(torch.eye(3), torch.tensor([0, 1, 2]))]


def test_options_of_the_training_override_those_of_the_command(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with ExitStack() as stack:
        track = Track(tmp_path, {"every": 1, "top": 1}, stack)
        assert not track.is_used
        tracker = track(model, F.cross_entropy, BATCHES, top=2, steps=7)
        assert track.is_used
        tracker.step()
        with pytest.raises(ValueError, match="tracks one model: call it once"):
            track(model, F.cross_entropy, BATCHES)
    points = read(track.folder / "points.jsonl")
    assert [(point.step, len(point.top)) for point in points] == [(7, 2), (8, 2)]


def test_a_run_without_points_has_its_status_alone(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, RUN, {"target": "mine:training"})
    run.begin()
    assert json.loads((tmp_path / "tracking.json").read_text())["status"] == "running"
    run.close("failed")
    assert json.loads((tmp_path / "tracking.json").read_text())["status"] == "failed"
    assert [file.name for file in tmp_path.iterdir()] == ["tracking.json"]


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tracking.json").write_text("half")
    with pytest.raises(ValueError, match="is damaged: remove it, or pass another --out"):
        TrackedRun(tmp_path, RUN, {"target": "mine:training"}).begin()
