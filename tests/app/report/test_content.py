import json
from dataclasses import replace

import torch

from hessfunc.app import report
from tests.app.report.cases import DENSITY, LINE, PARTS, RUN, SUBJECT, TRACE


def test_json_is_strict_and_has_what_is_drawn_but_no_vectors() -> None:
    content = report.content(RUN, SUBJECT, PARTS, status="complete")
    found = json.loads(report.as_text(content))
    assert found == content
    assert list(found["results"]) == list(report.NAMES)
    pairs, trace = found["results"]["eigenvalues"], found["results"]["trace"]
    assert pairs["values"] == [5.0, -2.5]
    assert pairs["converged"] == [True, False]
    assert "vectors" not in pairs
    assert trace["by_leaf"] == TRACE.by_leaf
    assert "samples" not in trace
    density = found["results"]["density"]
    assert (density["probes"], density["steps"]) == (2, 3)
    assert density["nodes"] == DENSITY.nodes.tolist()
    line, plane = found["results"]["line"], found["results"]["plane"]
    assert (line["values"], line["y"]) == (LINE.values.tolist(), None)
    assert [len(row) for row in plane["values"]] == [5] * 5
    assert {part["matvecs"] for part in (pairs, trace, density)} == {1234}


def test_what_is_not_finite_is_null() -> None:
    unsure = replace(TRACE, stderr=float("nan"))
    cliff = replace(LINE, values=torch.tensor([1.0, float("inf")], dtype=torch.float64))
    parts = [report.Part("trace", unsure, 0.5), report.Part("line", cliff, 0.5)]
    content = report.content(RUN, SUBJECT, parts, status="complete")
    found = json.loads(report.as_text(content))["results"]
    assert found["trace"]["stderr"] is None
    assert found["trace"]["interval_95"] == [None, None]
    assert found["line"]["values"] == [1.0, None]


def test_lists_of_numbers_are_one_line_and_strings_stay() -> None:
    content = {
        "reason": "a [ b,  c ]",
        "words": ["a", "b"],
        "rows": [[1, 2], [3, None]],
        "none": [],
    }
    text = report.as_text(content)
    assert json.loads(text) == content
    assert "[ 3, null ]" in text
    assert len(text.splitlines()) == 12
