from __future__ import annotations

from dataclasses import replace

import pytest

from bench.interleaved import Ratio
from bench.speed.asked import BY_TORCH
from bench.speed.cells import Cell, Row
from bench.speed.tables import markdown
from bench.speed.targets import Verdict, front, verdicts


def same(x: float) -> Ratio:
    return Ratio(x, x, x)


def cell(ours: float = 1.0, error: float = 1e-7) -> Cell:
    """Two libraries at 2 and 4 gradients, one that is wrong at 1, and autograd at 2.5."""

    def row(kind: str, gradients: float, error: float) -> Row:
        return Row(kind, same(gradients), {"hessfunc": same(ours / gradients)}, error)

    return Cell(
        "a net",
        tolerance=1e-2,
        rows={
            "hessfunc": Row("ours", same(ours), {}, error),
            "slow": row("peer", 4.0, 0.0),
            "fast": row("peer", 2.0, 1e-3),
            "wrong": row("peer", 1.0, 0.5),
            "autograd": row("plain", 2.5, 0.0),
        },
        gaps={"another": "not installed (No module named 'another')", "broken": "RuntimeError: no"},
    )


def verdict(name: str, found: Cell) -> Verdict:
    return next(one for one in verdicts({name: found}) if one.net == found.title)


def test_the_best_peer_is_the_cheapest_that_is_right() -> None:
    found = verdict("product/mlp-small", cell())
    assert (found.peer, found.of_peer, found.met) == ("fast", same(0.5), True)
    assert found.of_plain == same(0.4)


@pytest.mark.parametrize(("ours", "met"), [(2.1, True), (2.2, False)])
def test_a_target_is_met_up_to_its_bound(ours: float, met: bool) -> None:
    assert verdict("product/mlp-small", cell(ours)).met is met


def test_nothing_is_claimed_where_ours_is_wrong_or_not_there() -> None:
    found = verdict("product/mlp-small", cell(error=0.1))
    assert found.met is None
    assert "1e-01" in found.why
    assert all(one.met is None and one.why == "not measured" for one in verdicts({}))


def test_memory_is_compared_within_a_way() -> None:
    rows = {
        "hessfunc, reverse": Row("ours", bytes=50, alike="reverse"),
        "hessfunc, forward": Row("ours", bytes=30, alike="forward"),
        "theirs, reverse": Row("peer", bytes=100, alike="reverse"),
        "theirs, forward": Row("peer", bytes=20, alike="forward"),
        "hessfunc, looped": Row("ours", bytes=1, alike="looped"),
    }
    found = [one for one in verdicts({"memory/gpt": Cell("GPT", rows=rows)}) if one.ours]
    assert [(one.net, one.of_peer, one.met) for one in found] == [
        ("GPT: reverse", same(0.5), True),
        ("GPT: forward", same(1.5), False),
    ]


def test_the_table_names_what_is_wrong_and_what_is_not_there() -> None:
    text = markdown({"product/mlp-small": cell(3.0)})
    lines = [line for line in text.splitlines() if "| a net" in line]
    # A library that is missing might have been the best one.
    assert "**missed**; not installed: another " in lines[0]
    assert "**5e-01**" in next(line for line in lines if "| wrong" in line)
    assert "- a net: another: not installed" in text


def test_both_sides_are_compared_by_the_same_matrix_library() -> None:
    found = cell()
    by_torch = {"hessfunc": same(0.5), f"hessfunc{BY_TORCH}": same(0.9)}
    rows = {**found.rows, "fast": replace(found.rows["fast"], ours=by_torch)}
    assert verdict("product/mlp-small", replace(found, rows=rows)).by_torch == same(0.9)
    # Where hessfunc multiplies by torch's library anyway, there is one alternative of ours.
    same_library = replace(found, about={"matrices, hessfunc": "torch's"})
    assert verdict("product/mlp-small", same_library).by_torch == same(0.5)
    assert verdict("product/mlp-small", found).by_torch is None


def test_the_front_is_what_no_other_is_below_in_both() -> None:
    assert front([(3, 1), (1, 3), (2, 2), (2, 4), (3, 2)]) == [(1, 3), (2, 2), (3, 1)]
