"""Points in files and in TensorBoard."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.nn import functional as F

from hessfunc.tracking import read, tracked
from hessfunc.tracking.writers import csv_rows, json_lines, logging, summary_writer
from tests.tracking.problem import batches, point, problem, wide


def test_points_are_read_as_they_were_written(tmp_path: Path) -> None:
    append = json_lines(tmp_path / "folder" / "points.jsonl")
    points = [point(0, top=(2.0, 1.0), top_residuals=(0.1, 0.2), lr=0.3), point(5, trace=4.0)]
    for one in points:
        append(one)
    assert read(tmp_path / "folder" / "points.jsonl") == points


def test_a_line_that_was_cut_short_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    json_lines(path)(point(0))
    with path.open("a") as file:
        file.write('{"step": 1, "lo')
    assert [one.step for one in read(path)] == [0]
    json_lines(path)(point(1))
    assert [one.step for one in read(path)] == [0, 1]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": 1}\n', "step,loss\n1,2.0\n", "a,b", "[1"])
def test_a_file_of_something_else_stays(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(text)
    with pytest.raises(ValueError, match="is not a point"):
        json_lines(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == text


def test_points_of_steps_that_were_made_again_are_left_out(tmp_path: Path) -> None:
    append = json_lines(tmp_path / "points.jsonl")
    for step in (0, 10, 20, 30, 20, 30, 40):
        append(point(step, epoch=step))
    assert [one.step for one in read(tmp_path / "points.jsonl")] == [0, 10, 20, 30, 40]


def test_a_line_that_is_no_point_is_named(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    json_lines(path)(point(0))
    with path.open("a") as file:
        file.write('{"steps": 1}\n')
    with pytest.raises(ValueError, match="line 2 of"):
        read(path)


WRITER = """
import sys
from hessfunc.tracking.writers import json_lines
from hessfunc.tracking.measure import Point
append = json_lines(sys.argv[1])
for step in range(10**6):
    append(Point(step=step, loss=1.0, top=(1.0,) * 300, top_residuals=(0.0,) * 300))
"""


@pytest.mark.slow
def test_lines_are_whole_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=Path.cwd())
    while not path.exists() or path.stat().st_size < 50_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [one.step for one in read(path)]
    assert steps == list(range(len(steps)))
    json_lines(path)(point(len(steps)))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        *steps,
        len(steps),
    ]


class Scalars:
    def __init__(self) -> None:
        self.found: list[tuple[str, float, int]] = []
        self.flushed = 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.found.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        self.flushed += 1


def test_tensorboard_gets_the_numbers_that_were_measured(tmp_path: Path) -> None:
    _, _, model = problem()
    writer = Scalars()
    out = tmp_path / "points.jsonl"
    with tracked(
        model, F.cross_entropy, wide(batches(1)), tensorboard=writer, out=out, top=2
    ) as tracker:
        first = tracker.measure(lr=0.5)
    found = {tag: value for tag, value, step in writer.found if step == 0}
    assert found == {
        "curvature/top 1": first.top[0],
        "curvature/top 2": first.top[1],
        "curvature/loss": first.loss,
        "curvature/matvecs": first.matvecs,
        "curvature/2 over lr": 4.0,
    }
    assert writer.flushed == 1
    assert read(out) == [first]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    _, _, model = problem()
    with tracked(model, F.cross_entropy, wide(batches(1)), tensorboard=tmp_path) as tracker:
        for step in (0, 5):
            tracker.step(step)
            tracker.measure(lr=0.5)
    found = events.EventAccumulator(os.fspath(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == {
        "curvature/top 1",
        "curvature/loss",
        "curvature/matvecs",
        "curvature/2 over lr",
    }
    top = [(event.step, event.value) for event in found.Scalars("curvature/top 1")]
    assert top == [(p.step, pytest.approx(p.top[0])) for p in tracker.points]
    assert [step for step, _ in top] == [0, 5]


def test_without_tensorboard_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        summary_writer(os.fspath(tmp_path))


def test_rows_have_the_same_columns_and_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "points.csv"
    write = csv_rows(path, top=2, bottom=0)
    write(point(0))
    write(point(5, top=(2.0, 1.0), top_residuals=(0.1, 0.2), lr=0.3, trace=4.0))
    with path.open("a") as file:
        file.write("7,0.")
    csv_rows(path, top=2, bottom=0)(point(7, top=(3.0, 1.0), top_residuals=(0.0, 0.0)))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "5", "7"]
    assert [row["top_1"] for row in rows] == ["", "2.0", "3.0"]
    assert (rows[1]["top_2_residual"], rows[1]["lr"], rows[1]["trace"]) == ("0.2", "0.3", "4.0")
    assert "bottom_1" not in rows[0]


@pytest.mark.parametrize("text", ["step,loss\n1,2.0\n", "{}", "step,loss"])
def test_a_file_with_other_columns_stays(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match="has other columns than step, epoch"):
        csv_rows(tmp_path / "mine.csv", top=1, bottom=0)
    assert (tmp_path / "mine.csv").read_text() == text
    with pytest.raises(ValueError, match="cannot be written"):
        csv_rows(tmp_path, top=1, bottom=0)


class Run:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.axes: dict[str, str | None] = {}

    def log(self, data: dict[str, float]) -> None:
        self.rows.append(data)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric


def test_runs_of_weights_and_biases_keep_their_own_steps(tmp_path: Path) -> None:
    _, _, model = problem()
    run = Run()
    with tracked(
        model, F.cross_entropy, wide(batches(1)), every=2, wandb=run, csv=tmp_path / "points.csv"
    ) as tracker:
        tracker.step(2)
    assert run.axes == {"curvature/step": None, "curvature/*": "curvature/step"}
    assert [row["curvature/step"] for row in run.rows] == [0, 2]
    assert run.rows[1]["curvature/top 1"] == tracker.points[1].top[0]
    assert len((tmp_path / "points.csv").read_text().splitlines()) == 3
    seen: list[dict[str, float]] = []
    logging(SimpleNamespace(log=seen.append))(point(3))
    assert seen == [{"curvature/loss": 0.5, "curvature/matvecs": 0, "curvature/step": 3}]
    with (
        pytest.raises(TypeError, match=r"pass wandb=wandb.init\(\)"),
        tracked(model, F.cross_entropy, wide(batches(1)), wandb=3),  # type: ignore[arg-type]
    ):
        pass
