"""Insert measured tables and figures from `bench/results` when the site is built.

Each of these directives stands on a line of its own and is replaced:

    {{ accuracy.md }}                       text before the first section of the file
    {{ accuracy.md: The trace to 1 % }}     section with this title
    {{ coverage.md by estimator }}          coverage of the intervals of each estimator
    {{ speed in charts }}                   chart of the costs of each machine
    {{ speed by machine }}                  costs of products on all machines, and ratios as ranges
    {{ speed of each machine }}             section for each machine: its targets and figures

Figures of a machine are linked as ``images/<folder of the machine>-<figure>.png``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_ROOT = Path(__file__).parents[2]
# mkdocs does not put the root of the repository on the path, which `bench` needs.
sys.path.append(str(_ROOT))

from bench.speed.machines import compared, machines  # noqa: E402

_RESULTS = _ROOT / "bench" / "results"
_FIGURES = {
    "costs": "Costs of products compared with other libraries",
    "pareto": "Time and peak memory",
    "scaling": "Growth of costs with sizes",
}
_CHART = "costs"
_DIRECTIVE = re.compile(
    r"^\{\{ (?:(\S+\.md)(?:: (.+)| (by estimator))?"
    r"|speed (in charts|by machine|of each machine)) \}\}$",
    re.MULTILINE,
)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures of all machines to the files of the site."""
    for folder in _folders():
        for path in _figures(folder):
            name = f"images/{folder.name}-{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace directives by tables."""
    return _DIRECTIVE.sub(_inserted, markdown)


def _inserted(directive: re.Match[str]) -> str:
    name, section, by_estimator, speed = directive.groups()
    if speed == "in charts":
        return "\n\n".join(_chart(folder, _CHART) for folder in _charted())
    if speed == "by machine":
        return compared(machines(_RESULTS / "speed"))
    if speed:
        return "\n\n".join(map(_of_machine, _folders()))
    text = _measured(name).read_text()
    if by_estimator:
        return _by_estimator(text)
    head, sections = _parts(text)
    if section is None:
        return head
    if section not in sections:
        raise PluginError(
            f"bench/results/{name} has no section {section!r}: choose one of {list(sections)}"
        )
    return sections[section]


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """Return the text before the first section, without the title, and the sections by title."""
    head, *sections = re.split(r"^## ", text.partition("\n")[2], flags=re.MULTILINE)
    return head, {title: body for title, _, body in (part.partition("\n") for part in sections)}


def _folders() -> list[Path]:
    return sorted(path.parent for path in (_RESULTS / "speed").glob("*/speed.md"))


def _figures(folder: Path) -> list[Path]:
    return [path for name in _FIGURES if (path := folder / f"{name}.png").exists()]


def _of_machine(folder: Path) -> str:
    head, _ = _parts((folder / "speed.md").read_text())
    # The page begins with the other chart.
    names = [path.stem for path in _figures(folder) if path.stem != _CHART]
    charts = [_chart(folder, name) for name in names]
    return "\n\n".join([f"### {_title(folder)}", head, *charts])


def _charted() -> list[Path]:
    return [folder for folder in _folders() if (folder / f"{_CHART}.png").exists()]


def _chart(folder: Path, name: str) -> str:
    words = f"{_FIGURES[name]}, {_title(folder)}"
    return f"![{words}](images/{folder.name}-{name}.png){{ .wide }}\n\n*{words}.*"


def _title(folder: Path) -> str:
    (machine,) = machines(_RESULTS / "speed", folder.name)
    return machine.title


def _by_estimator(text: str) -> str:
    """Return the table of coverage, with one row per estimator over all spectra and stops."""
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
        script = Path(name).stem
        raise PluginError(f"bench/results/{name} is missing: run python -m bench.{script}")
    return path
