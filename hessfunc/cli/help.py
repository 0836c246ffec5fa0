"""The look of ``--help``."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "Group", "unless_given"]


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
