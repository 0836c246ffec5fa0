"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Arch",
    "DataPath",
    "Depth",
    "Device",
    "Traceback",
    "Training",
    "named_net",
    "refuse_data",
]

_DATA = "Data"

# Known here as well, so that --help and mistakes need not wait for torch.
_DATASETS = ("digits", "mnist", "cifar10")

Training = Annotated[
    str,
    typer.Option(metavar="NAME", help="digits, mnist or cifar10.", rich_help_panel=_DATA),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="c1, c2, mlp, or resnet20 and so on; of digits also convnet, of cifar10 chen, c4d3, "
        "c3d3.",
        show_default="mlp",
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(
        min=8, metavar="N", help="Of --arch resnet: 20, 32, 44, 56, 110.", show_default="20"
    ),
]
DataPath = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="MNIST: the folder of the four idx files or their .gz. CIFAR-10: the folder "
        "cifar-10-batches-py or an .npz file.",
        show_default="in $HESSFUNC_DATA",
        rich_help_panel=_DATA,
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Compute there: cpu, cuda, cuda:1, mps.")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]


def refuse_data(data: str, data_path: Path | None, /) -> None:
    """Raise where there is no such data set, or where it lies nowhere.

    Raises:
        ValueError: it is so.
    """
    if data not in _DATASETS:
        raise ValueError(f"--data is {', '.join(_DATASETS[:-1])} or {_DATASETS[-1]}, not {data!r}")
    if data == "digits" and data_path is not None:
        raise ValueError("--data-path goes with --data mnist or cifar10 alone")


def named_net(arch: str | None, depth: int | None, /) -> str:
    """The name of a net, its depth included.

    Raises:
        ValueError: the net has no depth to choose.
    """
    name = (arch or "mlp").lower()
    if name == "resnet":
        return f"resnet{depth or 20}"
    if depth is not None:
        raise ValueError(f"--depth goes with --arch resnet alone, not with {name}")
    return name
