import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.app.problems.nets import mlp
from hessfunc.app.problems.targets import (
    Batches,
    TargetError,
    cifar10,
    digits,
    first,
    imported,
    make_problem,
)
from hessfunc.training.examples import Examples
from tests.datapath import DATA, data_file


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return Examples(torch.randn(10, 4), torch.arange(10) % 3).batches(4)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A module of this test's own in the current directory; write to it, then import it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return tmp_path / (re.sub(r"\W", "_", request.node.name) + ".py")


def test_batches_are_placed_converted_and_cut(batches: list[Any]) -> None:
    placed = Batches(batches, device=torch.device("cpu"), dtype=torch.float64, size=3)
    assert [len(targets) for _, targets in placed] == [3, 1, 3, 1, 2]
    inputs, targets = next(iter(placed))
    assert (inputs.dtype, targets.dtype) == (torch.float64, torch.int64)
    assert [len(targets) for _, targets in Batches(batches)] == [4, 4, 2]


@pytest.mark.parametrize(("count", "sizes"), [(3, [3]), (4, [4]), (9, [4, 4, 1]), (99, [4, 4, 2])])
def test_first_takes_so_many_examples(batches: list[Any], count: int, sizes: list[int]) -> None:
    assert [len(targets) for _, targets in first(batches, count)] == sizes


def test_a_model_becomes_a_problem(batches: list[Any]) -> None:
    model = mlp([4, 3])
    expected = F.cross_entropy(
        model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])
    )
    problem = make_problem("it", (model, nn.CrossEntropyLoss(), batches), dtype=torch.float64)
    assert {leaf.dtype for leaf in problem.params.values()} == {torch.float64}
    loss, examples, count = problem.evaluate()
    assert (examples, count) == (10, 3)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_loss_becomes_a_problem() -> None:
    params = {"x": torch.ones(3, requires_grad=True)}
    returned = (lambda params, batch: (params["x"] * batch).sum(), params, [torch.ones(2, 3)])
    problem = make_problem("it", returned, dtype=torch.float64)
    assert problem.evaluate() == (6.0, 2, 1)


def one_by_one(batches: list[Any]) -> Iterator[Any]:
    yield from batches


def test_batches_that_can_be_read_once_are_enough_for_so_many_examples(batches: list[Any]) -> None:
    returned = (mlp([4, 3]), F.cross_entropy, one_by_one(batches))
    with pytest.raises(TargetError, match="only once"):
        make_problem("it", returned)
    assert make_problem("it", returned, count=9).evaluate()[1] == 9


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3, "it must return (model, criterion, loader) or (loss, params, batches), not int"),
        ((1, 2), "not tuple of length 2"),
        ((1, 2, 3), "not (int, int, int)"),
        ((mlp([4, 3]), "mse", []), "its criterion, of type str, is not callable"),
        ((F.cross_entropy, mlp([4, 3]).parameters(), []), "is a generator, not a tensor"),
        ((F.cross_entropy, {"x": torch.arange(3)}, []), "dtype torch.int64"),
        ((nn.ReLU(), F.cross_entropy, []), "no trainable parameter"),
    ],
)
def test_a_wrong_return_value_is_named(returned: Any, message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        make_problem("it", returned)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"scalar tensor, not \(4,\)"),
        (lambda outputs, targets: 1.0, "scalar tensor, not float"),
        (lambda outputs, targets: outputs.sum() * float("nan"), "the loss is nan on a batch of 4"),
    ],
)
def test_a_bad_loss_is_named(criterion: Any, message: str, batches: list[Any]) -> None:
    with pytest.raises(TargetError, match=message):
        make_problem("it", (mlp([4, 3]), criterion, batches)).evaluate()


def test_a_function_is_imported_from_here(module: Path) -> None:
    module.write_text("def it(): return 1, 2, 3")
    assert imported(f"{module.stem}:it") == (1, 2, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nowhere_to_be_found", r"ModuleNotFoundError: No module .* line 1\)"),
        ("x = = 1", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(1)", "SystemExit: 1"),
        ("it = 3", "has no function 'it'"),
        ("def it():\n    return 1 / 0", r"failed: ZeroDivisionError: .* line 2\)"),
    ],
)
def test_what_fails_in_a_module_is_named(module: Path, source: str, message: str) -> None:
    module.write_text(source)
    with pytest.raises(TargetError, match=message) as caught:
        imported(f"{module.stem}:it")
    assert "\n" not in str(caught.value)


def test_a_module_that_is_nowhere_is_named(module: Path) -> None:
    with pytest.raises(TargetError, match="'nowhere_to_be_found': it is neither in .* nor inst"):
        imported("nowhere_to_be_found.sub:it")


def test_digits_train_a_net_that_fits_them() -> None:
    pytest.importorskip("sklearn")
    losses: list[float] = []
    problem = make_problem("digits", digits(on_epoch=lambda _, loss: losses.append(loss)))
    loss, examples, _ = problem.evaluate()
    assert examples == 1500
    assert loss < 0.1 < losses[0]


def test_cifar10_is_the_trained_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    data_file("cifar10")
    weights = data_file("resnet20_cifar10/resnet20-12fca82f.th")
    monkeypatch.setenv("HESSFUNC_DATA", str(DATA))
    problem = make_problem("cifar10", cifar10(), count=100)
    loss, examples, _ = problem.evaluate()
    assert examples == 100
    assert loss < 0.6
    with pytest.raises(ValueError, match="not a checkpoint"):
        cifar10(DATA, data_file("cifar10/cifar10_subset.npz"))
    monkeypatch.delenv("HESSFUNC_DATA")
    assert len(cifar10(DATA, weights)[2]) == 10
    with pytest.raises(FileNotFoundError, match="no path to the weights"):
        cifar10(DATA)


def test_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    torch.save(mlp([4, 3]).state_dict(), tmp_path / "mlp.pt")
    with pytest.raises(ValueError, match="not contain the weights of a CIFAR ResNet-20"):
        cifar10(tmp_path, tmp_path / "mlp.pt")
