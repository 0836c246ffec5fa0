import json
from dataclasses import replace

import pytest

from hessfunc.app import report
from hessfunc.training import history
from tests.app.report.cases import RUN, SETTINGS, TRAINED
from tests.app.report.documents import numbers, parsed


def page(run: history.Run = TRAINED) -> str:
    return report.training(run, SETTINGS, RUN, b"\x89PNG")


def test_the_headlines_are_accuracy_updates_work_and_the_last_eigenvalue() -> None:
    text = page()
    cards = text[text.index('<dl class="headlines">') : text.index("</dl>") + len("</dl>")]
    written = [json.loads(str(e.attributes["value"])) for e in parsed(cards).all("data")]
    assert written == [0.625, 0.875, 1234, 4321.5, -12.5, 1.0]
    assert [e.text for e in parsed(cards).all("dt")] == [
        "test accuracy",
        "updates",
        "work",
        "dominant eigenvalue",
    ]


def test_what_was_not_measured_is_left_out() -> None:
    records = tuple(
        replace(record, test_loss=None, test_accuracy=None, eigenvalue=None)
        for record in TRAINED.records
    )
    document = parsed(page(replace(TRAINED, records=records)))
    assert [e.text for e in document.all("dt")][:3] == ["accuracy", "updates", "work"]
    columns = [e.text for e in document.all("th") if e.attributes["scope"] == "col"]
    assert "accuracy" in columns
    assert not {"test accuracy", "test loss", "dominant eigenvalue"} & set(columns)


def test_every_number_is_one_of_the_content() -> None:
    document = parsed(page())
    script, drawing = document.all("script")
    content = json.loads(script.text)
    assert "linesChart" in drawing.text
    plain = json.loads(json.dumps(history.content(SETTINGS, [TRAINED])))
    figures = content.pop("figures")
    assert content == {"run": vars(RUN), **plain}
    assert list(figures) == ["loss", "accuracy", "eigenvalue", "batches"]
    assert [one["name"] for one in figures["loss"]["series"]] == [
        "training examples",
        "test examples",
    ]
    known = set(numbers(content))
    written = document.all("data")
    assert len(written) > 40
    for element in written:
        value = json.loads(str(element.attributes["value"]))
        assert value in known
        shown = element.text.replace(",", "").replace("\N{MINUS SIGN}", "-")
        scale = 0.01 if shown.endswith("%") else 1.0
        assert scale * float(shown.rstrip("%")) == pytest.approx(value, rel=5e-3, abs=0.051)


def test_it_needs_no_network_and_has_its_picture_and_the_command() -> None:
    document = parsed(page())
    (picture,) = document.all("img")
    assert str(picture.attributes["src"]).startswith("data:image/png;base64,")
    assert document.all("code")[0].text == RUN.command
    assert [e.text for e in document.all("h1")] == ["c1 on digits"]
    assert "<sgd>, absa, 2 of 2 epochs" in document.all("header")[0].text
    assert "30, 60" in [e.text for e in document.all("dd")]


@pytest.mark.parametrize(
    ("ended", "status"),
    [("time is up", "time is up"), ("the loss is nan after 3 steps: <&", "ended early")],
)
def test_why_it_ended_is_said(ended: str, status: str) -> None:
    document = parsed(page(replace(TRAINED, ended=ended)))
    assert document.all("span")[0].text == status
    assert document.all("dd")[-1].text == ended
