"""The command ``hessfunc eig``."""

from pathlib import Path

import pytest
import torch

import hessfunc as hf
from hessfunc.app import tasks
from tests.app.cli.commands import assert_refused, eig, train


def test_eigenvalues_of_a_saved_net() -> None:
    train("--epochs", "1", "--arch", "mlp", "--examples", "250")
    file = "hessfunc-train/checkpoint.pt"
    model = tasks.saved("digits", "mlp", Path(file)).eval()
    seen, _ = tasks.examples("digits")
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    for kind, more, count in (
        ("approximate", (), 200),
        ("full", ("--examples", "250", "--batch-size", "100"), 250),
    ):
        done = eig("--resume", file, "--arch", "mlp", "--type", kind, "--k", "2", *more)
        assert done.exit_code == 0, done.output
        assert f"{count} examples" in done.stdout
        rows = [line.split() for line in done.stdout.splitlines() if "yes" in line]
        matvec = hf.hvp(loss)(params, (seen.inputs[:count], seen.targets[:count]))
        expected = hf.lanczos(matvec, params, k=2, seed=1).values.tolist()
        assert [float(row[1]) for row in rows] == pytest.approx(expected, rel=1e-3)


def test_eig_reads_plain_state_dicts_too() -> None:
    model = tasks.net("digits", "mlp")()
    torch.save({f"module.{n}": p for n, p in model.state_dict().items()}, "plain.pt")
    done = eig("--resume", "plain.pt")
    assert done.exit_code == 0, done.output
    assert "residual" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "none.pt"], "no weights at none.pt: expected checkpoint.pt of hessfunc"),
        (["--resume", "text.pt"], "text.pt is not a checkpoint"),
        (
            ["--resume", "mlp.pt", "--arch", "c1", "--data", "digits"],
            "of a c1 for digits: 0.weight is missing and 1.weight is not expected; pass --arch",
        ),
        (
            ["--resume", "wide.pt"],
            "1.weight has shape (9, 64), not (32, 64); pass --arch and --data of its training",
        ),
        (
            ["--resume", "mlp.pt", "--arch", "c9"],
            "--arch must be one of mlp, convnet, c1",
        ),
        (
            ["--resume", "other.pt", "--arch", "c1"],
            "is missing; pass --arch and --data of its training",
        ),
        (["--resume", "mlp.pt", "--data-path", "x"], "requires --data mnist or --data cifar10"),
        (["--resume", "mlp.pt", "--k", "9999"], "--k 9999: the matrix has 2410 eigenvalues"),
    ],
)
def test_mistakes_of_eig_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    Path("text.pt").write_text("not a checkpoint")
    torch.save(tasks.net("digits", "mlp")().state_dict(), "mlp.pt")
    wide = {**tasks.net("digits", "mlp")().state_dict(), "1.weight": torch.zeros(9, 64)}
    torch.save(wide, "wide.pt")
    torch.save({"settings": "[]", "state_dict": {}}, "other.pt")
    assert_refused(eig(*arguments), message)
