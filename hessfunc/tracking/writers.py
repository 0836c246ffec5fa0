"""Write and read points: files of JSON and CSV, TensorBoard, and Weights & Biases."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from hessfunc.options import validated
from hessfunc.tracking.measure import Point
from hessfunc.tracking.points import Points, row


def json_lines(path: str | os.PathLike[str], /) -> Callable[[Point], None]:
    """Return a function that appends a point to a file as one line of JSON.

    The line is on the disk when the function returns. A truncated last line, left by an interrupted
    run, is removed first.

    Raises:
        ValueError: If the file cannot be written, or if it contains anything but points.
    """
    file, content = _opened("out", path, "points.jsonl")
    whole = _whole(content)
    read(path)
    if not _is_cut_short(content[len(whole) :]):
        raise ValueError(
            f"the last line of {os.fspath(path)} is not a point: pass another file as `out`"
        )
    os.truncate(file, len(whole))

    def write(point: Point) -> None:
        line = json.dumps(asdict(point), allow_nan=False) + "\n"
        _append(file, line.encode())

    return write


def csv_rows(path: str | os.PathLike[str], /, *, top: int, bottom: int) -> Callable[[Point], None]:
    """Return a function that appends a point to a file as one row of comma-separated values.

    A new file begins with the names of the columns. A row is on the disk when the function returns.
    A truncated last row, left by an interrupted run, is removed first.

    Args:
        path: File to write.
        top: Number of columns of largest eigenvalues.
        bottom: Number of columns of smallest eigenvalues.

    Raises:
        ValueError: If the file cannot be written, or if it has other columns.
    """
    highest, lowest = (0.0,) * top, (0.0,) * bottom
    like = Point(
        step=0,
        loss=0.0,
        top=highest,
        top_residuals=highest,
        bottom=lowest,
        bottom_residuals=lowest,
    )
    names = list(row(like))
    header = _line(names)
    file, content = _opened("csv", path, "points.csv")
    whole = _whole(content)
    # Without a whole line, the content may be the beginning of the names.
    if not (whole.startswith(header) if whole else header.startswith(content)):
        raise ValueError(
            f"{os.fspath(path)} has other columns than {', '.join(names[:4])}, ...: pass another "
            "file as `csv`"
        )
    os.truncate(file, len(whole))

    if not whole:
        _append(file, header)

    def write(point: Point) -> None:
        values = row(point)
        _append(file, _line([values.get(name) for name in names]))

    return write


def _opened(option: str, path: str | os.PathLike[str], example: str, /) -> tuple[Path, bytes]:
    """Return a file that can be written, and its content.

    Raises:
        ValueError: If the file cannot be written.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return file, file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{option}={os.fspath(path)!r} cannot be written ({error.strerror}): pass the path of "
            f"a file, such as `{option}={example!r}`"
        ) from None


def _append(file: Path, line: bytes) -> None:
    """Append a line, which is on the disk when the function returns."""
    with file.open("ab", buffering=0) as stream:
        stream.write(line)
        os.fsync(stream.fileno())


def _line(values: Sequence[Any]) -> bytes:
    """Return values as one row, with nothing for None."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


@validated
def read(path: str | os.PathLike[str], /) -> Points:
    """Read the points of a file, in the order of their steps.

    A truncated last line is skipped. If the training was resumed from an earlier step, the points
    after this step from before the interruption are skipped too.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, or if a line is not a point.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{os.fspath(path)} does not exist: pass the path that `tracked` got as `out`"
        ) from None
    except OSError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
    points = Points()
    for number, line in enumerate(_whole(content).splitlines(), start=1):
        try:
            point = _point(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"line {number} of {os.fspath(path)} is not a point: {error}"
            ) from None
        while points and points[-1].step >= point.step:
            points.pop()
        points.append(point)
    return points


def _point(**plain: Any) -> Point:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()
    }
    return Point(**values)


def _is_cut_short(line: bytes) -> bool:
    """Return whether a line without an end may be a truncated point."""
    try:
        json.loads(line or b"{")
    except ValueError:
        return b'{"'.startswith(line[:2])
    return False


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


class ScalarWriter(Protocol):
    """Interface of a writer, the part of ``SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...

    def flush(self) -> object: ...


def summary_writer(folder: str | os.PathLike[str], /) -> Any:
    """Return a ``torch.utils.tensorboard.SummaryWriter`` for a folder.

    Raises:
        ModuleNotFoundError: If tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "torch's SummaryWriter needs tensorboard: `pip install tensorboard`"
        ) from None
    return SummaryWriter(os.fspath(folder))


def writing(writer: ScalarWriter, /) -> Callable[[Point], None]:
    """Return a function that passes the scalars of a point to a writer."""

    def write(point: Point) -> None:
        for tag, value in scalars(point).items():
            writer.add_scalar(tag, value, point.step)
        writer.flush()

    return write


class WandbRun(Protocol):
    """Interface of a run of Weights & Biases, the part that is used."""

    def log(self, data: Any, /) -> object: ...


def logging(run: WandbRun, /) -> Callable[[Point], None]:
    """Return a function that logs the scalars of a point to a run of Weights & Biases.

    The run has steps of its own, which must not decrease. Points therefore have ``curvature/step``
    as another axis.
    """
    if callable(define := getattr(run, "define_metric", None)):
        define("curvature/step")
        define("curvature/*", step_metric="curvature/step")

    def write(point: Point) -> None:
        run.log({**scalars(point), "curvature/step": point.step})

    return write


def scalars(point: Point, /) -> dict[str, float]:
    """Return the scalars of a point that are plotted, by tag."""
    values: dict[str, float | None] = {
        **{f"curvature/top {i}": value for i, value in enumerate(point.top, start=1)},
        **{f"curvature/bottom {i}": value for i, value in enumerate(point.bottom, start=1)},
        "curvature/trace": point.trace,
        "curvature/preconditioned": point.preconditioned,
        "curvature/critical": point.critical,
        "curvature/loss": point.loss,
        "curvature/matvecs": point.matvecs,
        "curvature/edge": point.edge,
        "curvature/preconditioned edge": point.preconditioned_edge,
    }
    if point.lr and point.optimizer is None and point.preconditioned_edge is None:
        # The optimiser is unknown: plot the edge 2 / lr of plain gradient descent.
        values["curvature/2 over lr"] = 2 / point.lr
    return {tag: value for tag, value in values.items() if value is not None}
