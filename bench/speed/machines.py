"""Costs on every machine that was measured: ``python -m bench.speed.machines`` prints the table.

It reads ``bench/results/speed/*/speed.md``, which the README and the site quote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.markdown import table

RESULTS = Path(__file__).parents[1] / "results" / "speed"
_PRODUCTS = {
    "one product": "Hessian",
    "block of": "Hessian, a block",
    "GGN": "GGN, a block",
}
_NETS = (
    "MLP 784-256-256-10",
    "GPT 4 x 128",
    "Llama 6 x 384",
    "ViT 6 x 384",
    "stories260K",
    "ResNet-20",
)
_PEER = "ours / best peer"
_BY_TORCH = "ours / best peer, by torch"


@dataclass(frozen=True)
class Machine:
    """The table of one machine.

    Attributes:
        title: Name of the GPU, or of the processor.
        rows: Entries of the table of targets by product and net, then by column.
    """

    title: str
    rows: dict[tuple[str, str], dict[str, str]]


def machines(root: Path = RESULTS, folder: str = "*") -> list[Machine]:
    """Return the machines whose tables lie in these folders, by the names of the folders."""
    return [_machine(path.read_text()) for path in sorted(root.glob(f"{folder}/speed.md"))]


def _machine(text: str) -> Machine:
    title = re.search(r"\bmachine: ([^,\n]+)", text)
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.partition("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    head, _, *lines = cells
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        row = dict(zip(head, line, strict=True))
        key = _first(_PRODUCTS, row["work"]), _first(_NETS, row["net"])
        if all(key) and row["ours"]:
            rows.setdefault(key, row)
    return Machine(title[1] if title else "", rows)


def _first(starts: Iterable[str], text: str) -> str:
    return next((start for start in starts if text.startswith(start)), "")


def compared(found: Sequence[Machine]) -> str:
    """Return the table of all products that two or more of the machines have measured."""
    by_torch = any(_number(row, _BY_TORCH) for one in found for row in one.rows.values())
    last = ["ours / best other, both by torch's matrix library"] if by_torch else []
    titles = [one.title for one in found]
    lines = [["product", "net", "floor", *titles, "ours / floor", "ours / best other", *last]]
    for start, product in _PRODUCTS.items():
        for net in _NETS:
            rows = [one.rows.get((start, net), {}) for one in found]
            ours = [_number(row, "ours") for row in rows]
            if len(ours) - ours.count(None) < 2:
                continue
            floor = min(x for row in rows if (x := _number(row, "floor")) is not None)
            columns = [_PEER, _BY_TORCH] if by_torch else [_PEER]
            shares = [[_number(row, column) for row in rows] for column in columns]
            over_floor = [x and x / floor for x in ours]
            costs = ["" if x is None else f"{x:.2f}" for x in ours]
            ranges = map(_range, [over_floor, *shares])
            lines.append([product, net, f"{floor:.2f}", *costs, *ranges])
    return table(lines)


def _number(row: dict[str, str], column: str) -> float | None:
    text = row.get(column, "").partition(" ")[0]
    return float(text) if text else None


def _range(values: Iterable[float | None]) -> str:
    texts = [f"{x:.2f}" for x in sorted(x for x in values if x is not None)]
    return " to ".join(dict.fromkeys([*texts[:1], *texts[-1:]]))


if __name__ == "__main__":
    print(compared(machines()))
