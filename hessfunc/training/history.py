"""Trainings as JSON: the file is rewritten after each training, and read to resume a series."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hessfunc.algorithms.results.result import versions
from hessfunc.files import write_text
from hessfunc.training.loop import Record


@dataclass(frozen=True, kw_only=True)
class Run:
    """Records of one training.

    Attributes:
        method: Name of the method.
        seed: Seed of the weights and the batches.
        ended: ``"complete"``, or the reason why the training ended earlier.
        records: Records, from the start on.
    """

    method: str
    seed: int
    ended: str
    records: tuple[Record, ...]


def last_measured(run: Run, /) -> Record | None:
    """Return the last record with an eigenvalue, or None."""
    return next((r for r in reversed(run.records) if r.eigenvalue is not None), None)


def is_tracked(run: Run, /) -> bool:
    """Return whether eigenvalues were measured."""
    return last_measured(run) is not None


def content(settings: Mapping[str, Any], runs: Sequence[Run], /) -> dict[str, Any]:
    """Return trainings and their common settings as plain data."""
    return {"settings": settings, "versions": versions(), "runs": [asdict(run) for run in runs]}


def write(path: Path, settings: Mapping[str, Any], runs: Sequence[Run], /) -> None:
    """Write trainings and their common settings to a file."""
    text = json.dumps(content(settings, runs), indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def read(path: Path, settings: Mapping[str, Any], /) -> list[Run]:
    """Read the trainings of a file; an empty list if there is no file.

    Raises:
        ValueError: If the file contains trainings with other settings, or if it is damaged.
    """
    if not path.exists():
        return []
    try:
        plain = json.loads(path.read_bytes())
        stored, runs = plain["settings"], [run_of(run) for run in plain["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or pass another --out") from None
    refuse_other_settings(path, stored, settings)
    return runs


def refuse_other_settings(
    path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any], /
) -> None:
    """Check that a file has the settings of this run.

    Raises:
        ValueError: If a setting differs.
    """
    wanted = json.loads(json.dumps(settings))
    if changed := [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]:
        raise ValueError(
            f"{path} contains trainings with other settings ({changed[0]} was "
            f"{stored.get(changed[0])} and is now {wanted.get(changed[0])}): pass another --out"
        )


def run_of(plain: Mapping[str, Any], /) -> Run:
    """Return the training of plain data, as `content` makes them."""
    records = tuple(Record(**record) for record in plain["records"])
    return Run(**{**plain, "records": records})
