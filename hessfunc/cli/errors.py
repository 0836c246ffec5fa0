"""Mistakes as one line and an exit code."""

from __future__ import annotations

from typing import NoReturn

import typer

from hessfunc.cli.ranks import speaks

__all__ = ["fail", "in_one_line"]


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
