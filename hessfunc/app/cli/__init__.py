"""Command line of hessfunc: the ``hessfunc`` command and its subcommands."""

from __future__ import annotations

import io
import sys
from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"hessfunc: the command line requires {missing.name}: pip install 'hessfunc[cli]'"
    ) from None

from hessfunc.app.cli.analyze import analyze
from hessfunc.app.cli.compare import compare
from hessfunc.app.cli.declarations import OPTIONS
from hessfunc.app.cli.eig import eig
from hessfunc.app.cli.errors import Command, Group
from hessfunc.app.cli.experiment import experiment
from hessfunc.app.cli.options import declared
from hessfunc.app.cli.plan import plan
from hessfunc.app.cli.track import track
from hessfunc.app.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command ``hessfunc``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal cannot show, such as letters of a path, become escapes.
            stream.reconfigure(errors="backslashreplace")
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from hessfunc import __version__

        typer.echo(f"hessfunc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Show the version and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Curvature of neural networks: eigenvalues, traces, spectral densities, and training."""


for command in (analyze, compare, eig, experiment, plan, track, train):
    # Extra arguments may be decay epochs without commas; `train` rejects them with a hint.
    settings = {"allow_extra_args": command is train}
    app.command(cls=Command, context_settings=settings)(
        declared(command, OPTIONS[command.__name__])
    )
