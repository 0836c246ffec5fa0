from __future__ import annotations

import re

import pytest

from bench.interleaved import Ratio
from bench.speed.cells import Cell, Row
from bench.speed.rule import choices, rule
from bench.speed.tables import markdown
from bench.speed.turns import Effort


def same(x: float) -> Ratio:
    return Ratio(x, x, x)


def test_the_rule_is_compared_with_the_best_fixed_chunk() -> None:
    def row(gradients: float) -> Row:
        return Row("ours", same(gradients), {"hessian, rule": same(1.1 / gradients)})

    rows = {"hessian, rule": Row("ours", same(1.1)), "hessian, 1": row(2.0), "hessian, 4": row(1.0)}
    cell = Cell("a net: k = 16", rows=rows)
    (found,) = choices(cell)
    assert found.of_best == same(1.1)
    assert found.fixed == {"1": same(2.0), "4": same(1.0)}
    assert re.search(r"\| 1: 2\.00, 4: 1\.00 +\| 1\.10 ", markdown({"rule/net": cell}))


@pytest.mark.parametrize(
    ("of", "sizes"), [("mlp-small/8", ["1", "4", "8"]), ("mlp-small/3", ["1", "3"])]
)
def test_chunks_of_both_matrices_are_measured(of: str, sizes: list[str]) -> None:
    found = choices(rule(of, Effort(seconds=0.0, least=1)))
    assert [one.matrix for one in found] == ["hessian", "ggn"]
    assert all(list(one.fixed) == sizes for one in found)
