import io
from collections.abc import Sequence
from dataclasses import replace

import pytest

from hessfunc.app import report
from hessfunc.app.report.rows import aligned
from tests.app.report.cases import PAIRS, PARTS, SUBJECT, TRACE

pytest.importorskip("rich")

from rich.console import Console


def printed(parts: Sequence[report.Part]) -> str:
    stream = io.StringIO()
    found = {part.name: report.as_json(part) for part in parts}
    Console(width=80, file=stream).print(report.table(found))
    return stream.getvalue()


def test_the_table_has_every_number_in_80_columns() -> None:
    text = printed(PARTS)
    first, second = (line.split() for line in text.splitlines() if "eigenvalue" in line)
    assert first == ["eigenvalue", "1", "5", "1.0e-05", "1,234", "1.2", "s"]
    assert second == ["eigenvalue", "2", "-2.5", "2.5e-01", "(not", "converged)"]
    assert "2 x 3 nodes" in text
    assert "5 x 5 grid" in text
    assert "-2.353 to 10.35" in text
    assert "…" not in text


def test_what_is_not_known_is_said() -> None:
    unsure = replace(TRACE, stderr=float("nan"))
    assert "unknown to unknown" in printed([report.Part("trace", unsure, 0.5)])


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="'other' is not a part of an analysis"):
        list(report.rows("other", {}))


def test_brief_and_headline_are_one_line() -> None:
    assert report.brief(PAIRS) == "5, 1 of 2 converged"
    assert report.brief(TRACE) == "4 ± 0.5"
    assert report.plain(report.headline(vars(SUBJECT))) == (
        "Hessian of the loss 0.5 over 100 examples, 12,345 parameters, float32 on cpu"
    )


def test_decimal_points_of_a_column_are_below_each_other() -> None:
    column = [(report.Number(x, ".5g"),) for x in (5.6195, 2.295, -12.0, 4.9e-8)]
    blanks = aligned(column)
    texts = [report.plain(words) + blank for words, blank in zip(column, blanks, strict=True)]
    places = [len(text) - text.index(".") for text in texts if "." in text and "e" not in text]
    assert len(set(places)) == 1
    # The integer ends where the points of the others are.
    assert len(texts[2]) - len("-12") == places[0]
    assert blanks[3] == ""
