"""Command ``hessfunc compare``, which shows two runs beside each other."""

from __future__ import annotations

from pathlib import Path

from hessfunc.app.terminal import Output


def compare(
    first: Path,
    second: Path,
    out: Path = Path("compare.html"),
) -> Output:
    """Compare two analyses, two trainings or two tracked trainings.

    Prints a table of both, and writes an HTML page in which their densities, losses and
    eigenvalues are drawn over each other. A RUN is a folder that `hessfunc analyze`, `train` or
    `track` has written.
    """
    from hessfunc.app.report import comparison
    from hessfunc.files import write_text

    runs = comparison.read([first, second])
    if out.exists() and b"hessfunc" not in out.read_bytes()[:4096]:
        raise ValueError(f"--out {out} is a file of another program: choose another name")
    page = comparison.comparison(runs)
    try:
        write_text(out, page)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be used: {error.strerror}") from error
    parts = (comparison.as_table(runs), f"{out} shows the figures of both")
    return Output(parts, comparison.content(runs))
