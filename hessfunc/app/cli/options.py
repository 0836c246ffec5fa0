"""Options that several commands share."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from typer.core import TyperCommand, TyperGroup

from hessfunc.app.cli.ranks import speaks


class DType(StrEnum):
    """A dtype of parameters and inputs."""

    float32 = "float32"
    float64 = "float64"


def place(
    device: str | None, dtype: DType | None = None
) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype of these names.

    Raises:
        ValueError: the device cannot be used.
    """
    import torch

    kind = getattr(torch, dtype) if dtype else None
    if device is None:
        return None, kind
    try:
        return torch.zeros(1, device=device, dtype=kind).device, kind
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from error


def make_folder(path: Path, /) -> None:
    """Make the folder of the results.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be used: {error.strerror}") from error


@contextmanager
def held(folder: Path, /) -> Iterator[None]:
    """Keep other commands out of a folder of results, which must exist, by a lock file in it.

    Raises:
        ValueError: Another command is running in the folder.
    """
    from hessfunc.algorithms.checkpoint import lock as locks

    try:
        owner = locks.acquire(folder, "", option="--out")
    except ImportError:
        # Windows has no locks of this kind.
        yield
        return
    try:
        yield
    finally:
        locks.release(folder, owner)


def refuse_other_files(folder: Path, names: Iterable[str], own: str, /) -> None:
    """Raise where results would overwrite files that no earlier run has written.

    Args:
        folder: The folder of the results.
        names: The names of the results.
        own: The file without which the folder belongs to no earlier run.

    Raises:
        ValueError: One of the names is taken.
    """
    there = [name for name in names if (folder / name).exists()]
    if there and not (folder / own).exists():
        raise ValueError(
            f"--out {folder} has a {there[0]}, and no {own} of an earlier run: choose another "
            "folder, or move that file"
        )


def unless_given(text: str, /, default: str) -> str:
    """The help of an option without a value of its own, and what holds where it is not given."""
    # typer would write such a default in brackets within brackets. Two spaces break a line.
    return f"{text}  \n[default: {default}]"


class _WithoutType:
    """A command whose ``--help`` is a flag, without a type."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class Command(_WithoutType, TyperCommand):
    """A command."""


class Group(_WithoutType, TyperGroup):
    """The command that has commands."""


def fail(message: str, code: int = 2, *, alone: bool = False) -> NoReturn:
    """Say what is wrong, and end the command.

    Args:
        message: what is wrong.
        code: with which the process ends.
        alone: the first of several processes may not be there any more to say it.
    """
    if speaks() or alone:
        typer.echo(f"hessfunc: {message}", err=True)
    raise typer.Exit(code)


def in_one_line(error: Exception, /) -> str:
    """What an error says."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return text
    return f"{type(error).__name__}: {text} (--traceback shows where)"


def command_line(context: typer.Context, /) -> str:
    """The running command as a shell takes it, without options that were left as they are."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        if parameter.param_type_name == "option":
            words.append(parameter.opts[-1])
        if not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)


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
