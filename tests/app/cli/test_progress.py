"""Lines and bars that show how far a command is."""

import io
import time

import pytest
from rich.console import Console
from rich.table import Table

from hessfunc.app.cli.progress import bar, bars, finished_fraction, line, print_table
from tests.training.records import record


def test_a_line_has_what_was_measured() -> None:
    plain = record(epoch=0.5, loss=2.0, accuracy=0.25, gradients=1234.0, seconds=0.25)
    assert line(plain) == (
        "epoch 0.5: loss 2.0000, accuracy 25.0%, 1,234 gradient-equivalents, 0.2 s"
    )
    full = line(record(test_accuracy=0.5, ratio=4, eigenvalue=-2.5))
    assert "accuracy 25.0% (test 50.0%), 4 batches a step, eigenvalue -2.5, " in full


def test_the_share_is_that_of_epochs_or_of_time_whichever_ends_first() -> None:
    assert finished_fraction(record(epoch=3.0, seconds=9.0), 4, None) == 0.75
    assert finished_fraction(record(epoch=1.0, seconds=90.0), 4, 2.0) == 0.75
    assert finished_fraction(record(epoch=1.0, seconds=30.0), 4, 2.0) == 0.25
    assert finished_fraction(record(epoch=1.0, seconds=90.0), 4, 0.0) == 1.0


def test_bars_are_drawn_on_a_terminal_alone() -> None:
    with bars() as progress:
        tick = bar(progress, "eigenvalues")
        tick(0.5, "3 of 6")
        (task,) = progress.tasks
    assert progress.disable
    assert (task.completed, task.fields["detail"]) == (0.5, "3 of 6")


def test_without_a_terminal_the_state_is_a_line_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with bars() as progress:
        tick = bar(progress, "eigenvalues")
        for clock[0] in (1.0, 31.0, 40.0):
            tick(0.5, "3 of 6")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eigenvalues: 50%, 3 of 6, ")
    with bars(quiet=True) as progress:
        tick = bar(progress, "eigenvalues")
        clock[0] = 100.0
        tick(0.5, "3 of 6")
    assert capsys.readouterr().err == ""


def test_a_table_keeps_its_width() -> None:
    table = Table("value", "residual")
    table.add_row("123456789.123", "1.0e-05")
    stream = io.StringIO()
    print_table(Console(file=stream, width=12), table)
    assert "123456789.123" in stream.getvalue()
    assert "1.0e-05" in stream.getvalue()
