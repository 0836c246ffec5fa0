"""Networks and data sets that options name, and that a checkpoint of `hessfunc train` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hessfunc.app.cli.declarations import DATASETS


@dataclass(frozen=True)
class Trained:
    """Network and data set of a checkpoint.

    Attributes:
        data: Name of the data set.
        data_path: Path to the data set; None to search in ``$HESSFUNC_DATA``.
        arch: Name of the network.
        examples: Number of training examples; None for all of them, or if it is not known.
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
    """Combine the settings of a checkpoint with the options; options not given are None.

    Raises:
        ValueError: If an option contradicts the checkpoint, or if the data set is unknown.
    """
    from hessfunc.training.checkpoint import settings_of

    settings = settings_of(file)
    named = None if arch is None and depth is None else named_net(arch or "resnet", depth)
    dataset = _agreed(file, "--data", data, settings, "data") or "digits"
    net = _agreed(file, "--arch", named, settings, "arch") or named_net(None, None)
    if dataset not in DATASETS:
        raise ValueError(f"{file} names an unknown data set {dataset!r}: pass another --resume")
    saved_path = settings.get("data_path")
    refuse_data(dataset, data_path)
    return Trained(
        data=dataset,
        data_path=Path(saved_path) if data_path is None and saved_path is not None else data_path,
        arch=net,
        examples=settings.get("examples"),
    )


def _agreed(
    file: Path, option: str, given: str | None, settings: Mapping[str, Any], name: str
) -> str | None:
    known = settings.get(name)
    if None not in (given, known) and given != known:
        raise ValueError(f"{file} was trained with {option} {known}, not {given}: omit {option}")
    return known if given is None else given


def refuse_data(data: str, data_path: Path | None, /) -> None:
    """Check that a data set takes a path, if there is one.

    Raises:
        ValueError: If the data set takes no path.
    """
    if data == "digits" and data_path is not None:
        raise ValueError("--data-path requires --data mnist or --data cifar10")


def named_net(arch: str | None, depth: int | None, /) -> str:
    """Return the name of a network, including its depth.

    Raises:
        ValueError: If a depth is given for a network that is not a ResNet.
    """
    name = (arch or "mlp").lower()
    if name == "resnet":
        return f"resnet{depth or 20}"
    if depth is not None:
        raise ValueError(f"--depth requires --arch resnet, not --arch {name}")
    return name
