"""What a saved net is: as its file says, and as options say that must agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hessfunc.app.cli.options import named_net, refuse_data


@dataclass(frozen=True)
class Trained:
    """A net and its data set.

    Attributes:
        data: the name of the data set.
        data_path: where it lies.
        arch: the name of the net.
        examples: how many it was trained on; None for all, or where nobody knows.
    """

    data: str
    data_path: Path | None
    arch: str
    examples: int | None


def trained(
    file: Path,
    /,
    *,
    data: str | None,
    data_path: Path | None,
    arch: str | None,
    depth: int | None,
) -> Trained:
    """What the file and the options say, which are None where they are not given.

    Raises:
        ValueError: they contradict each other, or there is no such data set.
    """
    from hessfunc.training.checkpoint import settings_of

    settings = settings_of(file)
    named = None if arch is None and depth is None else named_net(arch or "resnet", depth)
    found_data = _agreed(file, "--data", data, settings, "data") or "digits"
    found_arch = _agreed(file, "--arch", named, settings, "arch") or named_net(None, None)
    lies = settings.get("data_path")
    refuse_data(found_data, data_path)
    return Trained(
        data=found_data,
        data_path=Path(lies) if data_path is None and lies is not None else data_path,
        arch=found_arch,
        examples=settings.get("examples"),
    )


def _agreed(
    file: Path, option: str, given: str | None, settings: Mapping[str, Any], name: str
) -> str | None:
    known = settings.get(name)
    if None not in (given, known) and given != known:
        raise ValueError(f"{file} is of {option} {known}, not {given}: leave {option} away")
    return known if given is None else given
