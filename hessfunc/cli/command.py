"""A command as it was given."""

from __future__ import annotations

import shlex

import typer

__all__ = ["command_line"]


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
