from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.speed import __main__ as command
from bench.speed.cells import Cell, read
from bench.speed.device import VARIABLE
from bench.speed.machine import slug, title
from bench.speed.turns import Effort


def test_a_cell_that_breaks_down_ends_neither_the_run_nor_an_earlier_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*names: str, broken: str) -> dict[str, Cell]:
        def measure(name: str, effort: Effort) -> Cell:
            if name == broken:
                raise TypeError("unexpected argument")
            return Cell("a net", rounds=3)

        monkeypatch.setattr(command, "measure", measure)
        monkeypatch.setattr(
            sys, "argv", ["bench.speed", "--again", "--into", str(tmp_path), *names]
        )
        command.main()
        return read(tmp_path / slug(title()) / "cells")

    monkeypatch.setenv(VARIABLE, "cpu")
    names = "rule/mlp-small", "rule/lstm"
    first = measured(*names, broken="rule/mlp-small")
    assert first["rule/mlp-small"].absent == "TypeError: unexpected argument"
    assert first["rule/lstm"].rounds == 3
    assert first["rule/lstm"].about["machine"] == title()
    second = measured(*names, broken="rule/lstm")
    assert not second["rule/mlp-small"].absent
    assert second["rule/lstm"].rounds == 3
