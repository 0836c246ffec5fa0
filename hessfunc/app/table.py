"""Tables of training runs, with one row per method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.table import Table

from hessfunc.app import terminal
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
    """Return the table for the terminal, with the columns that fit there."""
    head = _head()
    shown = [i for i, column in enumerate(head) if column not in _IN_FILES_ALONE]
    rows = ([row[i] for i in shown] for row in _rows(runs))
    return terminal.table([head[i] for i in shown], rows)


def summary(run: Run, /, *, batch_size: int) -> Table:
    """Return the table of one training run for the terminal: the numbers of its last record.

    Args:
        run: Training run with at least one record.
        batch_size: Number of examples per base batch.
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
    return terminal.table(("", run.method), [pair for pair in cells.items() if pair[1]], left=2)


def markdown(runs: Sequence[Run], /) -> str:
    """Return the Markdown table of the last records of each method, as means over its seeds.

    Losses and accuracies are given with one standard deviation.
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
