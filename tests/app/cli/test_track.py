"""The command ``hessfunc track``."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from hessfunc.tracking import read
from tests.app.cli.commands import invoke

# Gradient descent on x'Dx / 2 with D = diag(5, 3, 1), which saves itself after each step.
TRAINING = """
from pathlib import Path
import torch

D = torch.tensor([5.0, 3.0, 1.0])

class Quadratic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones(3))

    def forward(self, scale):
        return scale.mean() * (D * self.x.square()).sum() / 2

def criterion(outputs, targets):
    return outputs

def training(track):
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, start = track.folder / "state.pt", 0
    if state.exists():
        start, saved = torch.load(state)
        model.load_state_dict(saved)
    batches = [(torch.ones(2), torch.zeros(2))]
    tracker = track(model, criterion, batches, optimizer=optimizer, steps=start)
    print("a line of the training")
    for step in range(start, 8):
        if step == 5 and Path("stop").exists():
            raise KeyboardInterrupt
        optimizer.zero_grad()
        criterion(model(batches[0][0]), None).backward()
        optimizer.step()
        tracker.step()
        torch.save((step + 1, model.state_dict()), state)

def silent(track):
    pass

def twice(track):
    for _ in range(2):
        track(Quadratic(), criterion, [(torch.ones(2), torch.zeros(2))])

def broken(track):
    training(track)
    raise RuntimeError("no more data")
"""


@pytest.fixture(autouse=True)
def training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trained", raising=False)
    (here / "trained.py").write_text(TRAINING)


def track(*words: str, target: str = "trained:training") -> Result:
    return invoke("track", target, "--every", "2", *words)


def test_points_report_and_table(here: Path) -> None:
    done = track("--top", "2", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["status"] == "complete"
    assert "a line of the training" in done.stderr
    assert [point["step"] for point in content["points"]] == [0, 2, 4, 6, 8]
    for point in content["points"]:
        assert point["top"] == pytest.approx([5, 3], rel=1e-4)
        assert point["edge"] == pytest.approx(20)
    names = {file.name for file in (here / "hessfunc-track").iterdir()}
    written = {"points.jsonl", "tracking.json", "report.html", "tracked.png"}
    assert names == written | {"state.pt"}
    assert "trained:training" in (here / "hessfunc-track" / "report.html").read_text()


def test_an_interrupted_training_continues(here: Path) -> None:
    (here / "stop").touch()
    stopped = track("-q")
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("interrupted; the measured points are in hessfunc-track\n")
    folder = here / "hessfunc-track"
    assert json.loads((folder / "tracking.json").read_text())["status"] == "interrupted"
    assert ">interrupted<" in (folder / "report.html").read_text()
    # A process that is killed while it writes leaves a truncated line.
    with (folder / "points.jsonl").open("a") as file:
        file.write('{"loss": 0.')
    (here / "stop").unlink()
    assert track("-q").exit_code == 0
    interrupted = [(point.step, point.loss) for point in read(folder / "points.jsonl")]
    assert [step for step, _ in interrupted] == [0, 2, 4, 5, 6, 8]
    (folder / "state.pt").unlink()
    assert track("-q", "--out", "whole").exit_code == 0
    whole = [(point.step, point.loss) for point in read(here / "whole" / "points.jsonl")]
    assert [point for point in interrupted if point[0] != 5] == whole


def test_the_same_command_starts_anew_where_the_function_does(here: Path) -> None:
    for _ in range(2):
        assert track("-q").exit_code == 0
        (here / "hessfunc-track" / "state.pt").unlink()
    points = read(here / "hessfunc-track" / "points.jsonl")
    assert [point.step for point in points] == [0, 2, 4, 6, 8]


def test_runs_are_compared(here: Path) -> None:
    assert track("-q", "--out", "a").exit_code == 0
    assert track("-q", "--out", "b", "--top", "2").exit_code == 0
    done = invoke("compare", "a", "b")
    assert done.exit_code == 0, done.output
    assert "largest eigenvalue 2" in done.stdout
    assert "two tracked trainings" in (here / "compare.html").read_text()


@pytest.mark.parametrize(
    ("words", "target", "message"),
    [
        ((), "trained", "TARGET must be module:function, not 'trained'"),
        ((), "trained:nothing", "has no function 'nothing'"),
        ((), "trained:silent", "returned without a call of its argument: call `tracker = track("),
        ((), "trained:twice", "`track` tracks one model: call it once"),
        ((), "trained:Quadratic", "must take one argument, as in `def training(track):`: too many"),
        ((), "trained:broken", "trained:broken failed: RuntimeError: no more data ("),
        (("--top", "4"), "trained:training", "the matrix has only 3 eigenvalues"),
        (("--out", "trained.py"), "trained:training", "--out trained.py cannot be used"),
        (("--out", "other"), "trained:training", "--out other contains a report.html, but no"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, words: tuple[str, ...], target: str, message: str
) -> None:
    (here / "other").mkdir()
    (here / "other" / "report.html").write_text("precious")
    refused = track(*words, "-q", target=target)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("hessfunc: ")
    assert (here / "other" / "report.html").read_text() == "precious"


def test_other_settings_are_refused(here: Path) -> None:
    assert track("-q").exit_code == 0
    refused = track("-q", "--top", "2")
    assert refused.exit_code == 2
    assert "other settings (top was 1 and is now 2): pass another --out" in refused.stderr


def test_the_training_is_the_same_without_tracking(here: Path) -> None:
    assert track("-q").exit_code == 0
    _, saved = torch.load(here / "hessfunc-track" / "state.pt")
    x = torch.ones(3)
    for _ in range(8):
        x = x - 0.1 * torch.tensor([5.0, 3.0, 1.0]) * x
    assert torch.allclose(saved["x"], x)
