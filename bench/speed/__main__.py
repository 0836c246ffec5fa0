"""``python -m bench.speed``: measure what is not there, and write the tables and figures."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from bench.speed.cells import Cell, about, read, write
from bench.speed.device import VARIABLE, device, full_precision
from bench.speed.machine import slug, title
from bench.speed.plan import FAST, PLAN, measure, within
from bench.speed.tables import markdown
from bench.speed.turns import Effort, reason_of

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = [
    "PyHessian",
    "hessian-eigenthings",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "scipy",
    "numpy",
    "transformers",
]


def main() -> None:
    """Measure what is not there, and write the tables and figures."""
    options = _options()
    os.environ[VARIABLE] = options.device
    if device().type == "cuda":
        full_precision()
    root = options.into or RESULTS / ("speed-fast" if options.fast else "speed")
    folder = root / slug(title())
    cells = read(folder / "cells")
    names = [
        name
        for name in (FAST if options.fast else PLAN)
        if any(fnmatch(name, chosen) for chosen in options.cells)
        and (options.again or name not in cells or cells[name].absent)
    ]
    if options.list:
        for name in PLAN:
            known = f"{cells[name].seconds:.0f} s" if name in cells else f"some {PLAN[name]:.0f} s"
            print(f"{name}: {'measured in ' if name in cells else ''}{known}")
        return
    effort = Effort(seconds=options.seconds, least=options.rounds)
    if options.minutes is not None:
        effort = Effort(seconds=options.seconds / 2, least=min(options.rounds, 3))
    if options.fast:
        effort = Effort(seconds=1.0, least=2)

    def took(name: str) -> float | None:
        return cells[name].seconds if name in cells else None

    chosen = within(options.minutes or float("inf"), names, took, time.monotonic)
    # torch warns about itself where it compiles its formulas for forward mode.
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
    for name in [] if options.tables else chosen:
        cell = _measured(name, effort)
        _tell(name, cell)
        # Without its data a cell that was measured before is kept.
        if not cell.absent or name not in cells:
            cells[name] = cell
            write(folder / "cells", name, cell)
    _publish(cells, folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.speed", description="Time products and answers beside other libraries."
    )
    parser.add_argument(
        "cells", nargs="*", default=["*"], help="Globs of cells, such as 'block/*'."
    )
    parser.add_argument(
        "--again", action="store_true", help="Measure cells again that were measured before."
    )
    parser.add_argument("--minutes", type=float, help="Start no cell that would take longer.")
    parser.add_argument(
        "--fast", action="store_true", help="Measure for three minutes, in another folder."
    )
    parser.add_argument("--device", default="cpu", help="Device to measure, such as cuda.")
    parser.add_argument("--into", type=Path, help="Folder in which the machine's folder lies.")
    parser.add_argument(
        "--list", action="store_true", help="List the cells with the time that each takes."
    )
    parser.add_argument("--tables", action="store_true", help="Write tables and figures only.")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="Seconds of timing for each cell."
    )
    parser.add_argument("--rounds", type=int, default=5, help="Fewest rounds of each cell.")
    return parser.parse_args()


def _measured(name: str, effort: Effort) -> Cell:
    start = time.perf_counter()
    try:
        cell = measure(name, effort)
    except (FileNotFoundError, ModuleNotFoundError) as absent:
        cell = Cell(name, absent=str(absent))
    except Exception as broken:
        # A net that does not run with these versions must not end the run of the others.
        cell = Cell(name, absent=reason_of(broken))
    # The graphs that other libraries leave at parameters hold themselves.
    gc.collect()
    return replace(cell, about=about(PACKAGES), seconds=time.perf_counter() - start)


def _tell(name: str, cell: Cell) -> None:
    costs = ", ".join(
        f"{title} {row.gradients.median:.2f}" for title, row in cell.rows.items() if row.gradients
    )
    what = cell.absent or costs or "measured"
    print(f"{name} ({cell.seconds:.0f} s): {what}", file=sys.stderr, flush=True)
    for alternative, why in cell.gaps.items():
        print(f"  {alternative}: {why}", file=sys.stderr, flush=True)


def _publish(cells: Mapping[str, Cell], folder: Path) -> None:
    in_order = {name: cells[name] for name in PLAN if name in cells}
    if not in_order:
        print(f"no cells in {folder}: its tables stay as they are", file=sys.stderr)
        return
    path = folder / "speed.md"
    path.write_text(markdown(in_order))
    print(path)
    try:
        from bench.speed.figures import draw
    except ModuleNotFoundError as absent:
        print(f"no figures: {absent}", file=sys.stderr)
        return
    for figure in draw(in_order, folder):
        print(figure)


if __name__ == "__main__":
    main()
