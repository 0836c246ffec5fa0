from __future__ import annotations

import re
from pathlib import Path

from bench.interleaved import Ratio
from bench.speed.cells import Cell, Row
from bench.speed.machines import compared, machines
from bench.speed.tables import markdown

README = Path(__file__).parents[3] / "README.md"


def written(folder: Path, machine: str, ours: float, best: float) -> None:
    share = ours / best
    cell = Cell(
        "GPT 4 x 128, T = 64, batch 8",
        {"torch": "2", "machine": machine, "matrices, hessfunc": "torch's"},
        floor=2.0,
        rows={
            "hessfunc": Row("ours", Ratio(ours, ours, ours)),
            "other": Row("peer", Ratio(best, best, best), {"hessfunc": Ratio(share, share, share)}),
        },
    )
    folder.mkdir()
    (folder / "speed.md").write_text(markdown({"product/gpt": cell}))


def test_costs_are_ranges_over_machines(tmp_path: Path) -> None:
    written(tmp_path / "a", "One (AVX2)", 2.0, 2.5)
    written(tmp_path / "b", "Another", 3.0, 2.0)
    head, _, row = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in compared(machines(tmp_path)).splitlines()
    )
    assert head[3:5] == ["One (AVX2)", "Another"]
    assert row[:5] == ["Hessian", "GPT 4 x 128", "2.00", "2.00", "3.00"]
    assert row[5:] == ["1.00 to 1.50", "0.80 to 1.50", "0.80 to 1.50"]


def test_what_one_machine_alone_measured_is_not_compared(tmp_path: Path) -> None:
    written(tmp_path / "a", "One", 2.0, 2.5)
    assert len(compared(machines(tmp_path)).splitlines()) == 2


def test_the_readme_has_the_table_of_its_machines() -> None:
    """``python -m bench.speed.machines`` prints the table anew."""
    text = README.read_text()
    head = next(line for line in text.splitlines() if line.startswith("| product "))
    named = [one for one in machines() if re.search(rf"\| {re.escape(one.title)} +\|", head)]
    assert len(named) > 1
    assert compared(named) in text
