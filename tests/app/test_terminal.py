import pytest

from hessfunc.app.terminal import print_parts, table


@pytest.mark.parametrize("columns", ["12", "40", "60"])
def test_a_table_keeps_its_width(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = table(("value", "residual"), [("123456789.123", "1.0e-05")])
    monkeypatch.setenv("COLUMNS", columns)
    print_parts([numbers, 99 * "word "])
    shown = capsys.readouterr().out
    assert "123456789.123" in shown
    assert "1.0e-05" in shown
    assert "\n" not in shown[shown.index("word") :].rstrip()


def test_an_empty_row_is_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    print_parts([table(("name", "GiB"), [("basis", "1.00"), (), ("total", "1.00")])])
    lines = capsys.readouterr().out.splitlines()
    rule = "\N{BOX DRAWINGS LIGHT HORIZONTAL}"
    head, basis, total = (i for i, text in enumerate(lines) if text.strip(f" {rule}"))
    assert lines[head].split() == ["name", "GiB"]
    assert total == basis + 2
