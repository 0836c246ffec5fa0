from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import LIMIT, Part, gpu_tests, groups, run, seconds_of
from bench.speed.plan import PLAN

TESTS = Path(__file__).parents[1]
PLANNED = groups("cuda", Path("results"))


def python(code: str, seconds: float, cells: int = 0) -> list[Part]:
    return [Part("a part", seconds, [sys.executable, "-c", code], cells)]


def test_the_plan_takes_less_than_eight_minutes() -> None:
    assert sum(map(seconds_of, PLANNED)) <= LIMIT <= 8 * 60 - 20


def test_every_test_that_needs_a_gpu_is_planned() -> None:
    marked = "@pytest.mark" + ".gpu"
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if marked in path.read_text()]
    assert len(files) > 5
    assert gpu_tests(TESTS) == files
    planned = [part.command[-1] for group in PLANNED for part in group]
    assert {str(path) for path in files} <= set(planned)


@pytest.mark.parametrize("short", [False, True])
def test_every_question_is_planned_with_cells_that_exist(short: bool) -> None:
    parts = [part for group in groups("cuda", Path("results"), short=short) for part in group]
    measured = {part.name: part for part in parts if part.cells}
    assert set(measured) == {"product", "block", "ggn", "eigenpairs", "memory"}
    for part in measured.values():
        cells = part.command[-part.cells :]
        assert set(cells) <= set(PLAN)
        assert all(cell.startswith(part.name) for cell in cells)


def test_a_part_that_hangs_or_fails_does_not_take_the_next_one_with_it() -> None:
    planned = [
        python("import time; time.sleep(60)", 1),
        python("raise SystemExit('broken')", 20),
        python("print('1 passed')", 20),
    ]
    found = list(run(planned, os.environ, limit=41.5))
    assert [(o.verdict, o.note) for o in found] == [
        ("stopped", ""),
        ("failed", "broken"),
        ("done", "1 passed"),
    ]


def test_parts_that_time_does_not_allow_are_not_begun() -> None:
    clock = iter([0.0, 100.0])
    (found,) = run([python("", 20)], os.environ, limit=50.0, clock=lambda: next(clock))
    assert found.verdict == "not reached"


def test_what_is_not_there_is_named() -> None:
    text = "a/b (3 s): hessfunc 1.20\n  other: not installed (No module)\na/c (1 s): no data\n"
    (part,) = python("", 1, cells=2)
    assert gpu._note(part, text) == "1 of 2 cells; not installed: other"


def test_results_are_copied_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (part,) = python("", 1)
    gpu._publish([gpu.Outcome(part, "done", 1.0, "noted", "printed")], tmp_path / "machine")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"gpu.md", "gpu.log", "results.tar.gz"}
    assert "| a part | done    | 1       | noted |" in (tmp_path / "out" / "gpu.md").read_text()
