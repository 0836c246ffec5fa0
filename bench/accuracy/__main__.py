"""``python -m bench.accuracy``: measure what has not been measured, and print the tables."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from fnmatch import fnmatch

from bench.accuracy.cases import CASES, RESULTS, SYNTHETIC
from bench.accuracy.measuring import measure
from bench.accuracy.methods import METHODS
from bench.accuracy.record import read, write
from bench.accuracy.tables import reach_cell


def main() -> None:
    """Measure what has not been measured, and print the tables."""
    parser = argparse.ArgumentParser(description="Products to a stated accuracy.")
    parser.add_argument("--fast", action="store_true", help="given spectra alone, five seeds")
    parser.add_argument("--case", default="*", help=f"a glob of {', '.join(CASES)}")
    parser.add_argument("--method", default="*", help="a glob of methods, such as '*xtrace'")
    parser.add_argument(
        "--again",
        nargs="?",
        default="",
        const="*",
        help="a glob of methods to measure anew, of those that --case and --method choose; "
        "alone, all of these",
    )
    options = parser.parse_args()
    # PyHessian keeps gradients with their graphs, of which torch warns.
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")

    path = RESULTS / ("accuracy-fast.json" if options.fast else "accuracy.json")
    cells = read(path)
    titles = json.loads(path.read_text())["titles"] if path.exists() else {}
    for case, make in (SYNTHETIC if options.fast else CASES).items():
        if not fnmatch(case, options.case):
            continue
        try:
            matrix = make()
        except FileNotFoundError as absent:
            print(f"{case} is left out: {absent}", file=sys.stderr)
            continue
        titles[case] = matrix.title
        titles = {name: titles[name] for name in CASES if name in titles}
        for method in METHODS:
            pairs = method.asked == "eigenpairs"
            seeds = matrix.seeds_for_pairs if pairs else matrix.seeds
            seeds = min(seeds, 5) if options.fast else seeds
            key = f"{case}/{method.asked}/{method.title}"
            version = method.version()
            known = cells.get(key)
            if not matrix.knows(method.asked) or not fnmatch(method.title, options.method):
                continue
            if version is None or (
                known is not None
                and (known.version, known.seeds) == (version, seeds)
                and not fnmatch(method.title, options.again)
            ):
                continue
            cells[key] = measure(matrix, method, seeds, version)
            write(path, cells, titles)
            print(f"{key}: {reach_cell(cells[key])}", file=sys.stderr)
    print(write(path, cells, titles))


if __name__ == "__main__":
    main()
