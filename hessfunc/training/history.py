"""Trainings as JSON: written whole after each of them, and read again to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hessfunc.algorithms.results import versions
from hessfunc.files import write_whole
from hessfunc.training.loop import Record


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        method: its name.
        seed: of its weights and batches.
        ended: ``"complete"``, or why it ended sooner.
        records: from the start on.
    """

    method: str
    seed: int
    ended: str
    records: tuple[Record, ...]


def last_measured(run: Run, /) -> Record | None:
    """The last record with an eigenvalue, if there is one."""
    return next((r for r in reversed(run.records) if r.eigenvalue is not None), None)


def is_tracked(run: Run, /) -> bool:
    """Whether eigenvalues were measured."""
    return last_measured(run) is not None


def content(settings: Mapping[str, Any], runs: Sequence[Run], /) -> dict[str, Any]:
    """Plain data of trainings and of the settings that they share."""
    return {"settings": settings, "versions": versions(), "runs": [asdict(run) for run in runs]}


def write(path: Path, settings: Mapping[str, Any], runs: Sequence[Run], /) -> None:
    """Write trainings and the settings that they share."""
    text = json.dumps(content(settings, runs), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read(path: Path, settings: dict[str, Any], /) -> list[Run]:
    """The trainings of a file, none where there is no file.

    Raises:
        ValueError: the file holds trainings of other settings, or is damaged.
    """
    if not path.exists():
        return []
    try:
        plain = json.loads(path.read_text())
        found, runs = plain["settings"], [_run(**run) for run in plain["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or take another --out") from None
    wanted = json.loads(json.dumps(settings))
    if changed := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        raise ValueError(
            f"{path} holds trainings of other settings, as {changed[0]} was "
            f"{found.get(changed[0])} and is {wanted.get(changed[0])} now: take another --out"
        )
    return runs


def _run(*, records: Sequence[dict[str, Any]], **rest: Any) -> Run:
    return Run(records=tuple(Record(**record) for record in records), **rest)
