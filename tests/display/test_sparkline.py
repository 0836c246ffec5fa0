"""Small figures as SVG."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from hessfunc.display import curve, pins


def heights(svg: str) -> list[float]:
    path = re.search(r'<path d="([^"]*)" fill="none"', svg)
    assert path is not None
    return [float(y) for _, y in re.findall(r"[ML](\S+) ([\d.]+)", path[1])]


def test_a_higher_value_is_drawn_higher() -> None:
    first, second, third = heights(curve([0, 1, 2], [1.0, 3.0, 2.0], title="t"))
    assert second < third < first


def test_a_gap_starts_a_new_line() -> None:
    svg = curve([0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0], title="t", filled=True)
    ElementTree.fromstring(svg)
    assert len(heights(svg)) == 3
    assert "nan" not in svg


@pytest.mark.parametrize("y", [[1.0], [math.nan], []])
def test_few_points(y: list[float]) -> None:
    svg = curve(list(range(len(y))), y, title="t", filled=True)
    assert not svg or ElementTree.fromstring(svg) is not None


@pytest.mark.parametrize("values", [[3.0], [-1.0, 2.0], [0.0], [5.0, 5.0]])
@pytest.mark.parametrize("radius", [0.0, 1.0, 1e9, math.inf])
def test_pins_stay_inside(values: list[float], radius: float) -> None:
    svg = pins(values, [radius] * len(values), title="eigenvalues & more")
    root = ElementTree.fromstring(svg)
    assert len(root.findall("{*}circle")) == len(values)
    assert all(0 <= float(c.attrib["cx"]) <= 320 for c in root.findall("{*}circle"))


def test_negative_numbers_have_a_minus_sign() -> None:
    assert "\N{MINUS SIGN}2" in pins([-2.0, 1.0], [0.0, 0.0], title="t")


def test_nothing_finite_is_not_drawn() -> None:
    assert pins([math.nan], [0.0], title="t") == ""
