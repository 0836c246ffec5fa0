import json
import re
from dataclasses import replace
from typing import Any

import pytest

from hessfunc.app import report
from tests.app.report.cases import PARTS, RUN, SUBJECT
from tests.app.report.documents import numbers, parsed


def test_its_data_are_the_content(page: str, content: dict[str, Any]) -> None:
    data, script = parsed(page).all("script")
    assert data.attributes == {"type": "application/json", "id": "content"}
    assert json.loads(data.text) == content
    assert script.attributes == {"type": "module"}


def test_every_number_is_one_of_the_content(page: str, content: dict[str, Any]) -> None:
    known = set(numbers(content))
    written = parsed(page).all("data")
    assert len(written) > 40
    for element in written:
        value = json.loads(str(element.attributes["value"]))
        assert value in known
        assert float(element.text.replace(",", "").replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            value, rel=5e-3, abs=0.051
        )
    headlines = re.findall(r"<dd><data value=\"([^\"]*)\">", page)[:4]
    assert [float(value) for value in headlines] == [0.5, 5.0, -2.5, 4.0]


def test_what_is_not_known_is_said() -> None:
    found = replace(PARTS[2].result, stderr=float("nan"))
    content = report.content(RUN, SUBJECT, [replace(PARTS[2], result=found)], status="complete")
    page = report.page(content, {})
    assert page.count('<data value="null">unknown</data>') == 2


def test_only_what_is_finished_is_shown() -> None:
    for count in range(len(PARTS)):
        content = report.content(RUN, SUBJECT, PARTS[:count], status="running")
        document = parsed(report.page(content, {}))
        figures = [figure.attributes["id"] for figure in document.all("figure")]
        assert figures == [n for n in report.NAMES[:count] if n in ("density", "line", "plane")]
        assert "running" in document.all("header")[0].text


def test_bars_have_a_common_zero(page: str) -> None:
    bars = re.findall(r'<i class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%">', page)
    (_, zero, width), (kind, left, negative) = bars
    assert kind == "negative"
    assert float(left) + float(negative) == pytest.approx(float(zero), abs=0.02)
    assert float(zero) + float(width) == pytest.approx(100, abs=0.02)
