"""Command that shows two runs beside each other."""

from pathlib import Path

from tests.app.cli.commands import analyze, assert_refused, invoke


def test_two_analyses(here: Path) -> None:
    for name in ("a", "b"):
        parts = ("--only", "eigenvalues,trace", "--k", "2")
        assert analyze("mine:quadratic", *parts, "--out", name).exit_code == 0
    done = invoke("compare", "a", "b")
    assert done.exit_code == 0, done.output
    assert "eigenvalue 2" in done.stdout
    assert "<h1>a and b</h1>" in (here / "compare.html").read_text()
    # The page of an earlier comparison is replaced.
    assert invoke("compare", "a", "b").exit_code == 0


def test_mistakes_are_one_line(here: Path) -> None:
    refused = invoke("compare", "a", "b")
    assert_refused(refused, "a contains neither results.json nor history.json")
    assert analyze("mine:quadratic", "--only", "trace", "--out", "a").exit_code == 0
    (here / "mine.html").write_text("precious")
    kept = invoke("compare", "a", "a", "--out", "mine.html")
    assert "--out mine.html is a file of another program" in kept.stderr
    assert (here / "mine.html").read_text() == "precious"
    assert "Missing argument" in invoke("compare", "a").stderr
