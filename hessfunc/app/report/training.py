"""Self-contained HTML page of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from hessfunc.app.report import lines
from hessfunc.app.report.content import Invocation
from hessfunc.app.report.html import (
    cards,
    document,
    facts,
    marked,
    scrolled,
    section,
    table,
    what_was_run,
)
from hessfunc.app.report.rows import Number, Row, Words
from hessfunc.training import history
from hessfunc.training.loop import Record

# Statuses that fit in the badge; all others are sentences and are shown as ended early.
_STATUSES = ("complete", "time is up", "interrupted", "running")
# Attributes of a record, with column titles and number formats.
COLUMNS = (
    *(("epoch", "epoch", "g"), ("step", "updates", ","), ("loss", "loss", ".4f")),
    *(("accuracy", "accuracy", ".1%"), ("test_loss", "test loss", ".4f")),
    *(("test_accuracy", "test accuracy", ".1%"), ("eigenvalue", "dominant eigenvalue", ".4g")),
    *(("ratio", "base batches a step", ","), ("lr", "learning rate", ".4g")),
    ("gradients", "work in gradients", ",.0f"),
)

_EDGE = (
    "The dashed line is 2 / lr: plain gradient descent is stable on a quadratic while all "
    "eigenvalues are below it."
)


def training(
    run: history.Run, settings: Mapping[str, Any], invocation: Invocation, picture: bytes, /
) -> str:
    """Return the page of a training run, with all assets inline, which needs no network.

    Args:
        run: Training run, finished or not, with at least one record.
        settings: Settings of the run as plain data, including ``data`` and ``arch``.
        invocation: Invocation of the run.
        picture: PNG picture of the training curves.
    """
    drawn = figures([(run, "")])
    content = {
        "run": asdict(invocation),
        **history.content(settings, [run]),
        "figures": lines.plain(drawn),
    }
    return document(
        content,
        title=f"{settings['arch']} on {settings['data']}",
        kind="Training of",
        status=run.ended if run.ended in _STATUSES else "ended early",
        headline=_headline(run, settings),
        parts=(
            _headlines(run),
            lines.elements(drawn, {drawn[0].name: picture} if drawn else {}),
            _epochs(run),
            what_was_run(content, shown_settings(settings)),
            _cost(run),
        ),
        scripts=lines.SCRIPTS,
    )


def figures(runs: Sequence[tuple[history.Run, str]], /) -> list[lines.Figure]:
    """Return the figures of trainings; quantities that were not measured have none.

    Args:
        runs: Trainings with their names, which are empty for a single training.
    """

    def of(attribute: str, label: str, *, dashed: bool = False) -> list[lines.Line]:
        return [
            lines.Line(
                name=", ".join(filter(None, (name, label))),
                points=[(record.epoch, getattr(record, attribute)) for record in run.records],
                run=i,
                dashed=dashed,
            )
            for i, (run, name) in enumerate(runs)
            if any(getattr(record, attribute) is not None for record in run.records)
        ]

    figure = partial(lines.Figure, x="epoch")
    seen, unseen = "training examples", "test examples"
    losses = [*of("loss", seen), *of("test_loss", unseen, dashed=True)]
    hits = [*of("accuracy", seen), *of("test_accuracy", unseen, dashed=True)]
    both = ("Solid lines are the training examples, dashed lines the test examples.",)
    edges = _edges(runs)
    drawn = [
        figure(name="loss", title="Loss", y="loss", is_log=True, lines=losses, meaning=both),
        figure(name="accuracy", title="Accuracy", y="accuracy", lines=hits, meaning=both),
        figure(
            name="eigenvalue",
            title="Dominant eigenvalue of the Hessian",
            y="eigenvalue",
            lines=[*of("eigenvalue", "dominant eigenvalue"), *edges],
            meaning=(_EDGE,) if edges else ("The eigenvalue of largest absolute value.",),
        ),
        figure(
            name="batches",
            title="Batch size",
            y="base batches a step",
            lines=of("ratio", "base batches a step"),
        ),
    ]
    return [figure for figure in drawn if figure.known and _changes(figure)]


def _edges(runs: Sequence[tuple[history.Run, str]]) -> list[lines.Line]:
    """Return 2 / lr of each training whose eigenvalues were measured and reach a tenth of it."""
    edges = []
    for i, (run, name) in enumerate(runs):
        values = [abs(r.eigenvalue) for r in run.records if r.eigenvalue is not None]
        rates = [(record.epoch, record.lr) for record in run.records if record.lr]
        if "newton" in run.method:
            continue
        if values and rates and max(values) > 0.1 * min(2 / rate for _, rate in rates):
            points = [(epoch, 2 / rate) for epoch, rate in rates]
            label = ", ".join(filter(None, (name, "2 / lr")))
            edges.append(lines.Line(name=label, points=points, run=i, dashed=True))
    return edges


def _changes(figure: lines.Figure) -> bool:
    """Return whether a figure shows more than one constant; a constant batch size is no figure."""
    values = {value for line in figure.lines for _, value in line.points}
    return figure.name != "batches" or len(values) > 1


def _headline(run: history.Run, settings: Mapping[str, Any]) -> Words:
    return (
        *(run.method, ", ", Number(run.records[-1].epoch, "g"), " of "),
        *(Number(settings["epochs"], ","), " epochs, "),
        *(Number(settings["examples"], ","), " examples in base batches of "),
        Number(settings["batch_size"], ","),
    )


def _headlines(run: history.Run) -> str:
    """Return the cards with the main numbers."""
    last, measured = run.records[-1], history.last_measured(run)
    seen = (Number(last.accuracy, ".1%"), " on the training examples")
    if last.test_accuracy is None:
        shown = [Row("accuracy", seen[:1], ("on the training examples",))]
    else:
        shown = [Row("test accuracy", (Number(last.test_accuracy, ".1%"),), seen)]
    shown.append(Row("updates", (Number(last.step, ","),), ("steps of the optimiser",)))
    shown.append(Row("work", (Number(last.gradients, ",.0f"),), ("gradients of a base batch",)))
    if measured is not None:
        when = ("after epoch ", Number(measured.epoch, "g"))
        shown.append(Row("dominant eigenvalue", (Number(measured.eigenvalue, ".4g"),), when))
    return cards(shown)


def _epochs(run: history.Run) -> str:
    """Return the table of all records, without empty columns."""
    known = [
        column
        for column in COLUMNS
        if any(getattr(record, column[0]) is not None for record in run.records)
    ]
    cells = [[_cell(record, name, style) for name, _, style in known] for record in run.records]
    title = "Epoch by epoch"
    columns = [(label, "number") for _, label, _ in known]
    return section("epochs", title, scrolled(title, table(columns, cells)))


def _cell(record: Record, name: str, style: str) -> str:
    value = getattr(record, name)
    return "" if value is None else marked((Number(value, style),))


def shown_settings(settings: Mapping[str, Any], /) -> Iterator[tuple[str, Words]]:
    """Yield the names and values of the settings that have a value."""
    for name, value in settings.items():
        if words := _setting(value):
            yield name.replace("_", " "), words


def _setting(value: Any) -> Words:
    match value:
        case None | "" | () | []:
            return ()
        case bool() | str():
            return (str(value),)
        case int() | float():
            return (Number(value, ""),)
        case _:
            first, *others = map(_setting, value)
            return (*first, *(word for words in others for word in (", ", *words)))


def _cost(run: history.Run) -> str:
    """Return the section with the cost of the steps, and why the run ended."""
    last = run.records[-1]
    return facts(
        "cost",
        "What it cost",
        (
            ("products", (Number(last.matvecs, ","),)),
            ("work", (Number(last.gradients, ",.0f"), " gradients of a base batch")),
            ("time", (Number(last.seconds, ",.1f"), " s in steps")),
            ("memory", (Number(last.peak_bytes, ","), " bytes in a step at most")),
            ("ended", (run.ended,)),
        ),
    )
