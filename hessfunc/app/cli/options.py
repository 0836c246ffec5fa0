"""Options and checks that several commands share."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from hessfunc.app.cli.ranks import speaks

# torch is imported late, so that --help does not wait for it.
if TYPE_CHECKING:
    import torch


# Floating-point dtypes with their short names.
DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def dtype_name(text: str, /) -> str:
    """Return the full name of a dtype such as bf16.

    Raises:
        typer.BadParameter: If the dtype is unknown.
    """
    names = {short: name for name, short in DTYPES.items()} | dict.fromkeys(DTYPES, "")
    if text not in names:
        known = ", ".join(f"{name} ({short})" for name, short in DTYPES.items())
        raise typer.BadParameter(f"must be one of {known}, not {text!r}")
    return names[text] or text


def quantity(text: str, /) -> float:
    """Return a number with a suffix or an exponent, such as 7B, 350M, 2.5k, 1e9 or 1,000.

    Raises:
        typer.BadParameter: If the text is not a number.
    """
    plain = text.replace(",", "").replace("_", "").strip().lower()
    scale = _SCALES.get(plain[-1:], 1.0)
    try:
        number = float(plain if scale == 1 else plain[:-1]) * scale
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise typer.BadParameter(f"must be a number such as 7e9 or 7B, not {text!r}")
    return number


def count(text: str, /) -> int:
    """Return a whole number with a suffix or an exponent, such as 1e3 or 10k.

    Raises:
        typer.BadParameter: If the text is not a whole number.
    """
    number = quantity(text)
    if number != round(number):
        raise typer.BadParameter(f"must be a whole number such as 1000 or 1k, not {text!r}")
    return round(number)


def one_of(text: str, choices: Sequence[str], flag: str, /) -> str:
    """Return a choice of an option.

    Raises:
        ValueError: If the choice is unknown; the message lists all choices.
    """
    if text not in choices:
        raise ValueError(f"{flag} must be one of {', '.join(choices)}, not {text!r}")
    return text


def place(
    device: str | None, dtype: str | None = None
) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the dtype with these names; None stays None.

    Raises:
        ValueError: If the device cannot be used.
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
    """Create the folder of the results.

    Raises:
        ValueError: If the folder cannot be created.
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
    """Refuse to overwrite files that no earlier run has written.

    Args:
        folder: Folder of the results.
        names: File names of the results.
        own: File that every earlier run leaves in its folder.

    Raises:
        ValueError: If a file of that name exists, but ``own`` does not.
    """
    taken = [name for name in names if (folder / name).exists()]
    if taken and not (folder / own).exists():
        raise ValueError(
            f"--out {folder} contains a {taken[0]}, but no {own} of an earlier run: choose another "
            "folder, or move that file"
        )


def unless_given(text: str, /, default: str) -> str:
    """Return the help text of an option whose default is None, followed by its actual default."""
    # typer would put such a default in doubled brackets. Two trailing spaces break the line.
    return f"{text}  \n[default: {default}]"


def option(
    metavar: str,
    text: str,
    /,
    *,
    default: str = "",
    panel: str | None = None,
    min: float | None = None,
    max: float | None = None,
    parser: Callable[[str], Any] | None = None,
) -> Any:
    """Declare an option.

    Args:
        metavar: Placeholder of the value.
        text: Help text.
        default: Default in words, where the default is None.
        panel: Title of the group of options in the help.
        min: Smallest value of a number.
        max: Largest value of a number.
        parser: Function from the text to the value, such as `quantity`.
    """
    shown = unless_given(text, default) if default else text
    common: dict[str, Any] = {"metavar": metavar, "help": shown, "rich_help_panel": panel}
    if parser is None:
        return typer.Option(min=min, max=max, **common)

    def parsed(value: Any) -> Any:
        # A default is a number already.
        number = parser(value) if isinstance(value, str) else value
        if min is not None and number < min:
            raise typer.BadParameter(f"must be at least {min:g}, not {value}")
        return number

    return typer.Option(parser=parsed, **common)


class _WithoutType:
    """Mixin that shows ``--help`` as a flag, without a type."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class Command(_WithoutType, TyperCommand):
    """Subcommand of ``hessfunc``."""


class Group(_WithoutType, TyperGroup):
    """Command ``hessfunc`` itself, which dispatches to its subcommands.

    A mistake in an option is one line, like all other errors of the commands.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command, and exit unless ``standalone_mode=False``."""
        is_alone = kwargs.pop("standalone_mode", True)
        run: Callable[..., Any] = super().main
        if not is_alone:
            return run(*args, standalone_mode=False, **kwargs)
        try:
            sys.exit(run(*args, standalone_mode=False, **kwargs) or 0)
        except typer.Abort:
            typer.echo("hessfunc: interrupted", err=True)
            sys.exit(130)
        except Exception as error:
            refusal: Any = error
            if not hasattr(refusal, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                refusal.show()
            elif speaks():
                typer.echo(f"hessfunc: {_told(refusal)}", err=True)
            sys.exit(refusal.exit_code)


def _told(refusal: Any) -> str:
    """Return the message of a mistake in the arguments on one line, with the option first."""
    parameter, context = getattr(refusal, "param", None), getattr(refusal, "ctx", None)
    message = " ".join(refusal.format_message().split()).rstrip(".")
    if message.startswith("No such command") and context is not None:
        return f"{message}: choose one of {', '.join(context.command.commands)}"
    if parameter is None or not isinstance(refusal, typer.BadParameter) or not refusal.message:
        return message
    named = parameter.param_type_name == "option"
    flag = parameter.opts[-1] if named else parameter.human_readable_name
    message = " ".join(refusal.message.split()).rstrip(".").replace("Input should be", "must be")
    return f"{flag}{' ' if message.startswith('must') else ': '}{message}"


def fail(message: str, code: int = 2, *, alone: bool = False) -> NoReturn:
    """Print an error message and exit.

    Args:
        message: Error message, one line.
        code: Exit code of the process.
        alone: Whether every process prints the message, because rank 0 may have died.
    """
    if speaks() or alone:
        typer.echo(f"hessfunc: {message}", err=True)
    raise typer.Exit(code)


def in_one_line(error: Exception, /) -> str:
    """Return the message of an error on one line, with its type if the type is unexpected."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return text
    return f"{type(error).__name__}: {text} (use --traceback for details)"


def command_line(context: typer.Context, /) -> str:
    """Return the running command as a shell command, without options that were not given."""
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
# Repeated here, so that --help and error messages do not wait for the data sets' modules.
_DATASETS = ("digits", "mnist", "cifar10")


def _arch(default: str) -> Any:
    return option(
        "NAME",
        "Network: c1, c2, mlp, or a ResNet such as resnet20; for digits also convnet, for "
        "cifar10 also chen, c4d3, c3d3.",
        default=default,
    )


def _depth(default: str) -> Any:
    text = "Depth with --arch resnet: 20, 32, 44, 56, 110."
    return option("N", text, default=default, min=8)


def _data_path(default: str) -> Any:
    return option(
        "PATH",
        "Path to the data. MNIST: the folder of the four idx files or their .gz. CIFAR-10: "
        "the folder cifar-10-batches-py or an .npz file.",
        default=default,
        panel=_DATA,
    )


_DATA_NAMES = "Data set: digits, mnist or cifar10."
Training = Annotated[str, option("NAME", _DATA_NAMES, panel=_DATA)]
Arch = Annotated[str | None, _arch("mlp")]
Depth = Annotated[int | None, _depth("20")]
DataPath = Annotated[Path | None, _data_path("searched in $HESSFUNC_DATA")]
# Options of a command that reads a checkpoint, whose settings are their defaults.
TrainedOn = Annotated[
    str | None,
    option("NAME", _DATA_NAMES, default="that of the checkpoint, else digits", panel=_DATA),
]


TrainedArch = Annotated[str | None, _arch("that of the checkpoint, else mlp")]
TrainedDepth = Annotated[int | None, _depth("that of the checkpoint, else 20")]
TrainedDataPath = Annotated[Path | None, _data_path("that of the checkpoint, else $HESSFUNC_DATA")]
Device = Annotated[str | None, option("NAME", "Device to compute on: cpu, cuda, cuda:1, mps.")]


Traceback = Annotated[
    bool, typer.Option("--traceback", metavar="", help="Show the Python traceback of an error.")
]


def refuse_data(data: str, data_path: Path | None, /) -> None:
    """Check the data set and its path.

    Raises:
        ValueError: If the data set is unknown, or if it takes no path.
    """
    if data not in _DATASETS:
        raise ValueError(
            f"--data must be {', '.join(_DATASETS[:-1])} or {_DATASETS[-1]}, not {data!r}"
        )
    if data == "digits" and data_path is not None:
        raise ValueError("--data-path requires --data mnist or --data cifar10")


def refuse_seed(seed: int, /) -> None:
    """Check that random generators accept a seed.

    Raises:
        ValueError: If the seed is negative or does not fit in 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be an integer from 0 to 2^63 - 1, not {seed}")


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
