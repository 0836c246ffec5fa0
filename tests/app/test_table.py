"""Tables of trainings."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest

from hessfunc.training.history import Run
from tests.training.records import record


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    from hessfunc.app.table import markdown, table
    from hessfunc.app.terminal import print_parts

    runs = [
        Run(method="SGD", seed=0, ended="complete", records=(record(loss=9.0), record(loss=1.0))),
        Run(method="SGD", seed=1, ended="time is up", records=(record(loss=3.0),)),
        Run(method="PCH", seed=0, ended="complete", records=(record(test_accuracy=0.5),)),
    ]
    lines = markdown(runs).splitlines()
    assert len(lines) == 4
    assert "| SGD | 0, 1 | 2.0000 ± 1.4142 | 25.0% ± 0.0% |" in lines[2]
    assert lines[2].endswith("| 1.0 MiB | complete; time is up |")
    assert "| 50.0% |" in lines[3]
    print_parts([table(runs)])
    text = capsys.readouterr().out
    assert "PCH" in text
    assert "…" not in text


def test_a_summary_of_one_training() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from hessfunc.app.table import summary

    def lines(run: Run) -> list[str]:
        text = StringIO()
        Console(width=80, file=text).print(summary(run, batch_size=32))
        return [" ".join(line.split()) for line in text.getvalue().splitlines()]

    plain = Run(method="SGD", seed=0, ended="complete", records=(record(), record(loss=1.0)))
    found = lines(plain)
    assert "SGD" in found[1]
    assert "loss 1.0000" in found
    assert not any(line.startswith(("test loss", "dominant", "batch size")) for line in found)
    measured = record(epoch=4.0, eigenvalue=-2.5)
    grown = replace(plain, records=(record(), measured, record(epoch=5.0, ratio=4, lr=0.4)))
    assert {"dominant eigenvalue -2.5 (epoch 4)", "batch size 128", "learning rate 0.4"} <= set(
        lines(grown)
    )
    at_the_end = replace(plain, records=(record(), replace(measured, lr=0.1)))
    assert "dominant eigenvalue -2.5" in lines(at_the_end)
