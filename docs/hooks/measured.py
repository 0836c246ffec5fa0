"""What was measured is taken from `bench/results` whenever the site is built.

On a line of its own in a page,

    {{ speed.md }}                          all that stands before the first section of that table
    {{ accuracy.md: The trace to 1 % }}     that section
    {{ coverage.md by estimator }}          how often the intervals of each estimator covered

A figure of that folder is linked as if it lay in ``images/``.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_RESULTS = Path(__file__).parents[2] / "bench" / "results"
_FIGURES = ("speed-costs.png", "speed-pareto.png", "speed-scaling.png")
_DIRECTIVE = re.compile(r"^\{\{ (\S+\.md)(?:: (.+)| (by estimator))? \}\}$", re.MULTILINE)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures to the files of the site."""
    for name in _FIGURES:
        source = str(_measured(name))
        files.append(File.generated(config, f"images/{name}", abs_src_path=source))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put tables in place of the lines that name them."""
    return _DIRECTIVE.sub(_table, markdown)


def _table(found: re.Match[str]) -> str:
    name, section, by_estimator = found.groups()
    text = _measured(name).read_text()
    if by_estimator:
        return _by_estimator(text)
    # Without its title, which the page has.
    head, *sections = re.split(r"^## ", text.partition("\n")[2], flags=re.MULTILINE)
    if section is None:
        return head
    for one in sections:
        title, _, body = one.partition("\n")
        if title == section:
            return body
    raise PluginError(f"bench/results/{name} has no section {section!r}")


def _by_estimator(text: str) -> str:
    """Return the table of coverage with all spectra and stops of an estimator in one row."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    levels = [name for name in rows[0] if name.startswith("at ")]
    covered: dict[str, list[list[float]]] = {}
    for estimator, _, _, *cells in rows[2:]:
        shares = [float(cell.removesuffix(" %")) for cell in cells[: len(levels)]]
        covered.setdefault(estimator, []).append(shares)
    lines = [
        f"| estimator | {' | '.join(levels)} | cases |",
        "|---" + "|---:" * (len(levels) + 1) + "|",
    ]
    for estimator, cases in covered.items():
        by_level = zip(*cases, strict=True)
        cells = [f"{min(shares):.1f} % ({median(shares):.1f} %)" for shares in by_level]
        lines.append(f"| {estimator} | {' | '.join(cells)} | {len(cases)} |")
    return "\n".join(lines)


def _measured(name: str) -> Path:
    path = _RESULTS / name
    if not path.exists():
        raise PluginError(f"bench/results/{name} is missing: `make bench` or its script writes it")
    return path
