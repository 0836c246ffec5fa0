"""Trainings as a table, one row a method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from hessfunc.training.history import Run, last_measured
from hessfunc.training.loop import Record

_COLUMNS: dict[str, Callable[[Sequence[Record]], str]] = {
    "loss": lambda ends: _spread([e.loss for e in ends], "{:.4f}"),
    "accuracy": lambda ends: _spread([e.accuracy for e in ends], "{:.1%}"),
    "test loss": lambda ends: _spread([e.test_loss for e in ends], "{:.4f}"),
    "test accuracy": lambda ends: _spread([e.test_accuracy for e in ends], "{:.1%}"),
    "steps": lambda ends: _mean([e.step for e in ends], "{:,.0f}"),
    "products": lambda ends: _mean([e.matvecs for e in ends], "{:,.0f}"),
    "work in gradients": lambda ends: _mean([e.gradients for e in ends], "{:,.0f}"),
    "time": lambda ends: _mean([e.seconds for e in ends], "{:,.1f} s"),
    "peak memory": lambda ends: _mean([e.peak_bytes / 2**20 for e in ends], "{:,.1f} MiB"),
}


_IN_FILES_ALONE = {"seeds", "test loss", "steps", "products", "ended"}


def table(runs: Sequence[Run], /) -> Table:
    """For the terminal, as much as fits there."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    head = _head()
    shown = [i for i, column in enumerate(head) if column not in _IN_FILES_ALONE]
    for i in shown:
        longest = max(map(len, head[i].split()))
        found.add_column(head[i], justify="right" if i else "left", min_width=longest)
    for row in _rows(runs):
        found.add_row(*(row[i] for i in shown))
    return found


def summary(run: Run, /, *, batch_size: int) -> Table:
    """One training for the terminal, one line a number of its last record.

    Args:
        run: with a record at least.
        batch_size: examples of a base batch.
    """
    last, measured = run.records[-1], last_measured(run)
    cells = {name: cell([last]) for name, cell in _COLUMNS.items()}
    if measured is not None:
        when = "" if measured is last else f" (epoch {measured.epoch:g})"
        cells |= {
            "dominant eigenvalue": f"{measured.eigenvalue:.4g}{when}",
            "batch size": f"{last.ratio * batch_size:,}",
            "learning rate": f"{last.lr:.4g}",
        }
    found = Table("", run.method, box=box.SIMPLE_HEAD, pad_edge=False)
    for name, cell in cells.items():
        if cell:
            found.add_row(name, cell)
    return found


def markdown(runs: Sequence[Run], /) -> str:
    """For a file: the last records of each method, as means over its seeds.

    Losses and accuracies are with one standard deviation.
    """
    head = _head()
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *_rows(runs)))


def _head() -> list[str]:
    return ["method", "seeds", *_COLUMNS, "ended"]


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        ends = [run.records[-1] for run in own if run.records]
        seeds = ", ".join(str(run.seed) for run in own)
        cells = [cell(ends) if ends else "" for cell in _COLUMNS.values()]
        rows.append([method, seeds, *cells, "; ".join(dict.fromkeys(run.ended for run in own))])
    return rows


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(statistics.fmean(values))


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = _mean(known, form)
    return mean if len(known) == 1 else f"{mean} ± {form.format(statistics.stdev(known))}"
