"""Trainings as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from hessfunc.training.history import Run, read, write
from tests.training.records import record


def test_trainings_go_through_a_file(tmp_path: Path) -> None:
    path, settings = tmp_path / "results.json", {"epochs": 3, "blocks": (1, 2)}
    assert read(path, settings) == []
    runs = [Run(method="SGD", seed=1, ended="complete", records=(record(), record(step=2)))]
    write(path, settings, runs)
    assert read(path, settings) == runs
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="epochs was 3 and is now 4.: pass another --out"):
        read(path, {**settings, "epochs": 4})
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read(path, settings)
