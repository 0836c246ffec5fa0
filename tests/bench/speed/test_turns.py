from __future__ import annotations

import pytest
import torch

from bench.interleaved import Turns
from bench.speed import models, ours, plain
from bench.speed.asked import BY_TORCH, Alternative, Asked, Matrix, Work
from bench.speed.products import floor, judge
from bench.speed.turns import Effort, prepared, rows_of, taken, timed
from hessfunc.autograd.matrices import has_faster

ONCE = Effort(seconds=0.0, least=1)


def absent(asked: Asked) -> Work:
    raise ModuleNotFoundError("No module named 'another'")


def wrong(asked: Asked) -> Work:
    return Work(lambda: 2 * asked.rows(), lambda rows: rows)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_ours_agrees_with_autograd_and_what_is_wrong_is_not_timed(matrix: Matrix) -> None:
    asked = Asked(models.made("mlp-small", 4), matrix, k=2)
    alternatives = [
        *ours.PRODUCTS,
        Alternative("absent", "", "peer", absent),
        Alternative("wrong", "", "peer", wrong),
        *(plain.PRODUCTS if matrix == "hessian" else plain.GAUSS_NEWTON),
    ]
    ready, gaps = prepared(asked, alternatives, judge(plain.expected(asked)))
    found = timed(asked, ready, ONCE, 1e-4)
    rows = rows_of(ready, found)
    assert gaps == {"absent": "not installed (No module named 'another')"}
    assert rows["hessfunc"].error < 1e-5
    assert rows["hessfunc"].products == 2
    assert rows["wrong"].error > 0.1
    assert "wrong" not in found.seconds
    assert not rows["wrong"].ours
    assert rows[alternatives[-1].title].ours["hessfunc"].median > 0


def test_ours_is_measured_by_torchs_matrix_library_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watching(asked: Asked) -> Work:
        seen.append(has_faster(asked.rows()))
        return Work(lambda: seen.append(has_faster(asked.rows())), lambda rows: rows)

    alternatives = [Alternative("watching", "", "ours", watching), *plain.PRODUCTS]
    monkeypatch.setattr(ours, "has_other_library", lambda: True)
    _, by_torch, *others = ours.with_both_libraries(alternatives)
    assert (by_torch.title, others) == (f"watching{BY_TORCH}", plain.PRODUCTS)
    by_torch.make(Asked(models.made("mlp-small", 4))).call()
    assert seen == [False, False]
    monkeypatch.setattr(ours, "has_other_library", lambda: False)
    assert ours.with_both_libraries(alternatives) == alternatives


def test_a_data_set_has_the_hessian_of_its_batches() -> None:
    case = models.made("mlp-small", 12)
    of_batches = Asked(case, k=2, batches=models.batches_of(case, 3))
    torch.testing.assert_close(plain.expected(of_batches), plain.expected(Asked(case, k=2)))
    work = ours.DATA[0].make(of_batches)
    assert judge(plain.expected(of_batches))(work.answer(work.call())).error < 1e-5


def test_the_first_layer_lowers_the_floor() -> None:
    case = models.made("mlp-wide", 4)
    products = 784 * 256, 256 * 256 + 256 * 10
    gradient = 2 * products[0] + 3 * products[1]
    assert floor(Asked(case)) == (2 * products[0] + 6 * products[1]) / gradient
    assert floor(Asked(case, "ggn")) == (2 * products[0] + 4 * products[1]) / gradient


@pytest.mark.parametrize(("matrix", "expected"), [("hessian", 2), ("ggn", 4 / 3)])
def test_the_floor_of_a_deep_net_is_that_of_its_matrix_products(
    matrix: Matrix, expected: float
) -> None:
    assert floor(Asked(models.made("gpt-tiny"), matrix)) == pytest.approx(expected, rel=1e-3)


def test_columns_are_the_rows() -> None:
    asked = Asked(models.made("mlp-small", 4), k=3)
    rows = torch.cat([leaf.movedim(-1, 0).flatten(1) for leaf in asked.columns()], 1)
    assert torch.equal(rows, asked.rows())


def test_rounds_are_as_many_as_the_effort_says() -> None:
    turns = Turns({"nothing": lambda: None})
    taken(turns, Effort(seconds=0.0, least=4))
    assert len(turns.seconds["nothing"]) == 4
    taken(turns, Effort(seconds=60.0, least=1, most=3))
    assert len(turns.seconds["nothing"]) == 7
