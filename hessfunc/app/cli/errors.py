"""Errors of commands: one line on standard error, and an exit code."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from hessfunc.app.cli.progress import results_alone, show
from hessfunc.app.cli.ranks import speaks
from hessfunc.app.terminal import Output

if TYPE_CHECKING:
    from hessfunc.app.report.content import Invocation


class _WithoutType:
    """Mixin that shows switches such as ``--help`` without a type."""

    def get_params(self, ctx: Any) -> Any:
        parameters = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if parameter.metavar is None and getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class Command(_WithoutType, TyperCommand):
    """Subcommand of ``hessfunc``, whose errors are one line unless ``--traceback`` is given."""

    def invoke(self, ctx: Any) -> None:
        """Run the command, and print its results."""
        as_json, quiet = ctx.params["as_json"], ctx.params["quiet"]
        try:
            with results_alone() if as_json else nullcontext():
                output: Output = super().invoke(ctx)
                show(output, as_json=as_json, quiet=quiet)
        except KeyboardInterrupt:
            fail("interrupted", code=130)
        except Exception as error:
            # Mistakes in the arguments have a message of their own, see `Group`.
            is_own = isinstance(error, typer.Exit) or hasattr(error, "format_message")
            if is_own or ctx.params["traceback"]:
                raise
            message = _with_flag(in_one_line(error), ctx)
            fail(message, alone=isinstance(error, ConnectionError))
        if output.failure:
            fail(output.failure)
        if output.code:
            raise typer.Exit(output.code)


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
        known = ", ".join(context.command.commands)
        return f"{message.partition('.')[0]}: choose one of {known}"
    if parameter is None or not isinstance(refusal, typer.BadParameter) or not refusal.message:
        return message
    flag = _flag(parameter) if parameter.param_type_name == "option" else parameter.metavar
    message = " ".join(refusal.message.split()).rstrip(".")
    return f"{flag}{' ' if message.startswith('must') else ': '}{message}"


def _flag(parameter: Any) -> str:
    """Return the longest flag of an option."""
    flag: str = max(parameter.opts, key=len)
    return flag


def _with_flag(message: str, context: Any) -> str:
    """Return a message that begins with an argument of the library with the option instead."""
    options = {p.name: _flag(p) for p in context.command.params if p.param_type_name == "option"}
    named = re.match(r"(\w+)=([^:,]+): ", message)
    if named is None or named[1] not in options:
        return message
    return f"{options[named[1]]} {named[2]}: {message[named.end() :]}"


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
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text
    return f"{type(error).__name__}: {text} (use --traceback for details)"


def given(context: typer.Context, /) -> Mapping[str, Any]:
    """Return the values of the parameters that were given on the command line, by name."""
    source = context.get_parameter_source
    kinds = {name: source(name) for name in context.params}
    return {
        name: context.params[name]
        for name, kind in kinds.items()
        if kind is not None and kind.name == "COMMANDLINE"
    }


def invocation(context: typer.Context, /) -> Invocation:
    """Return the running command with its seed and the time."""
    from hessfunc.app.report.content import Invocation

    began = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return Invocation(command_line(context), context.params["seed"], began)


def command_line(context: typer.Context, /) -> str:
    """Return the running command as a shell command, without options that were not given."""
    words, values = context.command_path.split(), given(context)
    for parameter in context.command.params:
        if (value := values.get(parameter.name or "")) is None:
            continue
        if parameter.param_type_name == "option":
            words.append(_flag(parameter))
        if not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)
