import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hessfunc.app.cli import app
from tests.app.cli.commands import SMALL, number, plan
from tests.app.problems.language_models import gpt2, saved


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        (
            "--params 3e9 --dtype bfloat16 --recompute --ranks 64 --gpu-memory 80",
            r"^It fits: 5[34]\.\d+ of 77\.00 GiB",
        ),
        (
            "--params 1e9 --ranks 8 --gpu-memory 80",
            r"^It does not fit(?s:.*)recompute=.* yes ",
        ),
    ],
)
def test_the_plans_of_the_page_are_what_it_says(options: str, verdict: str) -> None:
    page = Path(__file__).parents[3] / "docs/how-to/command-line.md"
    assert f"hessfunc plan {options}\n" in page.read_text()
    assert re.search(verdict, plan(*options.split()).stdout, re.MULTILINE)


def test_the_time_is_that_of_the_gradients_given() -> None:
    output = plan(*SMALL, "--gradient-seconds", "2").stdout
    step, run = number(output, "network passes, s")
    assert (step, run) == (6, pytest.approx(6 * 113, abs=1))
    assert number(output, "total sent, GiB") == [0, 0]


@pytest.mark.parametrize(
    ("algorithm", "first"),
    [
        ("slq", "slq: 1 probe of 100 steps"),
        ("hutchinson", "hutchinson: 100 probes, 10 at once"),
        ("xtrace", "xtrace: 50 probes, 10 at once"),
    ],
)
def test_algorithms(algorithm: str, first: str) -> None:
    done = plan(*SMALL, "--algorithm", algorithm)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--largest", "1e9"),
            "--largest 1000000000: the largest leaf must have 1 to ",
        ),
        (("--basis-size", "5"), "at least k + 2 block_size = 12"),
        (("--colour", "red"), "No such option: --colour"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = plan(*SMALL, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("text", ["7B", "7b", "7e9", "7_000_000_000", "7,000,000,000", "7000M"])
def test_sizes_are_written_as_people_write_them(text: str) -> None:
    done = plan("--params", text, "--graph-memory", "1", "--dtype", "bf16")
    assert done.exit_code == 0, done.output
    assert "7,000,000,000 in bfloat16" in done.stdout


def test_a_model_of_hugging_face(tmp_path: Path) -> None:
    model = gpt2()
    folder = saved(tmp_path, model)
    done = plan(f"hf:{folder}", "--batch-tokens", "64")
    assert done.exit_code == 0, done.output
    count = sum(p.numel() for p in model.parameters())
    assert re.search(rf"{count:,} in float32 +read from the config", done.stdout)
    assert re.search("largest parameter +2,048 +read from the config", done.stdout)
    assert re.search("tokens per sequence +16 +assumed, up to the context", done.stdout)
    assert "omit them" in plan(f"hf:{folder}", "--params", "7B").stderr
    assert "TARGET must be hf:PATH, not 'gpt2'" in plan("gpt2").stderr
    assert "--params 7B, or a target hf:PATH" in plan().stderr


def test_the_exit_code_is_one_where_a_plan_does_not_fit() -> None:
    assert plan(*SMALL, "--gpu-memory", "80").exit_code == 0
    done = plan(*SMALL, "--gpu-memory", "4")
    assert done.exit_code == 1
    assert "It does not fit" in done.stdout
    assert done.stderr == ""


def test_a_narrow_terminal_cuts_no_number() -> None:
    wide = plan(*SMALL)
    narrow = CliRunner().invoke(app, ["plan", *SMALL], env={"COLUMNS": "30"})
    assert narrow.exit_code == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow.stdout
    assert number(narrow.stdout, "total") == number(wide.stdout, "total")
