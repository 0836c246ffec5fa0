"""Command ``hessfunc compare``, which shows two runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hessfunc.app.cli.options import Traceback, fail, in_one_line, option
from hessfunc.app.cli.progress import print_table


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of another run.")],
    out: Annotated[Path, option("FILE", "HTML page of the comparison.")] = Path("compare.html"),
    traceback: Traceback = False,
) -> None:
    """Compare two analyses or two trainings.

    Prints a table of both, and writes an HTML page in which their densities, losses and
    eigenvalues are drawn over each other. A RUN is a folder that `hessfunc analyze` or
    `hessfunc train` has written.
    """
    try:
        from hessfunc.app.report import comparison
        from hessfunc.files import write_whole

        runs = comparison.read([first, second])
        if out.exists() and b"hessfunc" not in out.read_bytes()[:4096]:
            raise ValueError(f"--out {out} is a file of another program: choose another name")
        page = comparison.comparison(runs).encode()
        try:
            write_whole(out, lambda file: file.write(page))
        except OSError as error:
            raise ValueError(f"--out {out} cannot be used: {error.strerror}") from error
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error))
    console = Console(markup=False, emoji=False, highlight=False)
    print_table(console, comparison.as_table(runs))
    console.print(f"{out} shows the figures of both", soft_wrap=True)
