"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hessfunc.cli.help import unless_given

__all__ = [
    "Arch",
    "DataPath",
    "Depth",
    "Device",
    "Traceback",
    "TrainedArch",
    "TrainedDataPath",
    "TrainedDepth",
    "TrainedOn",
    "Training",
    "named_net",
    "refuse_data",
    "refuse_seed",
]

_DATA = "Data"

# Known here as well, so that --help and mistakes need not wait for torch.
_DATASETS = ("digits", "mnist", "cifar10")


def _arch(default: str) -> Any:
    return typer.Option(
        metavar="NAME",
        help=unless_given(
            "c1, c2, mlp, or resnet20 and so on; of digits also convnet, of cifar10 chen, c4d3, "
            "c3d3.",
            default,
        ),
    )


def _depth(default: str) -> Any:
    text = "Of --arch resnet: 20, 32, 44, 56, 110."
    return typer.Option(min=8, metavar="N", help=unless_given(text, default))


def _data_path(default: str) -> Any:
    return typer.Option(
        metavar="PATH",
        help=unless_given(
            "MNIST: the folder of the four idx files or their .gz. CIFAR-10: the folder "
            "cifar-10-batches-py or an .npz file.",
            default,
        ),
        rich_help_panel=_DATA,
    )


_DATA_NAMES = "digits, mnist or cifar10."

Training = Annotated[str, typer.Option(metavar="NAME", help=_DATA_NAMES, rich_help_panel=_DATA)]
Arch = Annotated[str | None, _arch("mlp")]
Depth = Annotated[int | None, _depth("20")]
DataPath = Annotated[Path | None, _data_path("in $HESSFUNC_DATA")]

# Of a net that was trained before.
TrainedOn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=unless_given(_DATA_NAMES, "that of the training, else digits"),
        rich_help_panel=_DATA,
    ),
]
TrainedArch = Annotated[str | None, _arch("that of the training, else mlp")]
TrainedDepth = Annotated[int | None, _depth("that of the training, else 20")]
TrainedDataPath = Annotated[Path | None, _data_path("that of the training, else in $HESSFUNC_DATA")]

Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Compute there: cpu, cuda, cuda:1, mps.")
]
Traceback = Annotated[
    bool, typer.Option("--traceback", metavar="", help="Show where an error was raised.")
]


def refuse_data(data: str, data_path: Path | None, /) -> None:
    """Raise where there is no such data set, or where it lies nowhere.

    Raises:
        ValueError: it is so.
    """
    if data not in _DATASETS:
        raise ValueError(f"--data is {', '.join(_DATASETS[:-1])} or {_DATASETS[-1]}, not {data!r}")
    if data == "digits" and data_path is not None:
        raise ValueError("--data-path goes with --data mnist or cifar10 alone")


def refuse_seed(seed: int, /) -> None:
    """Raise where generators cannot begin at a seed.

    Raises:
        ValueError: it is so.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is a whole number from 0 to 2^63 - 1, not {seed}")


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
