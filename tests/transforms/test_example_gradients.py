"""Gradients of single examples, against gradients of batches of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hessfunc as hf
from hessfunc.transforms.example_gradients import example_gradients
from hessfunc.trees import tree_map

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
MODEL_FN, PARAMS = hf.functional(MODEL)
LOSS = hf.supervised(MODEL_FN, nn.functional.cross_entropy)
X, Y = torch.randn(7, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])


def joined(blocks: Any) -> Any:
    return tree_map(lambda *parts: torch.cat(parts), *blocks)


@pytest.mark.parametrize("examples_per_chunk", [None, 1, 3])
def test_gradients_are_those_of_batches_of_one(examples_per_chunk: int | None) -> None:
    blocks = list(example_gradients(LOSS, PARAMS, (X, Y), examples_per_chunk=examples_per_chunk))
    assert len(blocks) == {None: 1, 1: 7, 3: 3}[examples_per_chunk]
    found = joined(blocks)
    for i in range(len(X)):
        alone = torch.func.grad(LOSS)(PARAMS, (X[i : i + 1], Y[i : i + 1]))
        torch.testing.assert_close(tree_map(lambda leaf, i=i: leaf[i], found), alone)


def test_parameters_in_16_bits_have_gradients_in_32() -> None:
    fn, params = hf.functional(nn.Linear(4, 3).bfloat16())
    loss = hf.supervised(fn, nn.functional.cross_entropy)
    (block,) = example_gradients(loss, params, (X.bfloat16(), Y))
    assert {leaf.dtype for leaf in block.values()} == {torch.float32}


def test_what_has_no_gradient_of_its_own_is_an_error() -> None:
    with pytest.raises(ValueError, match="the gradient of an example is not finite"):
        list(example_gradients(LOSS, PARAMS, (X.clone().fill_(torch.inf), Y)))
    with pytest.raises(ValueError, match="divided along first axes of equal length"):
        list(example_gradients(LOSS, PARAMS, (X, Y[:5])))
    with pytest.raises(ValueError, match="does not depend on params"):
        list(example_gradients(lambda p, b: b.sum(), PARAMS, X, examples_per_chunk=1))
    normalised = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    fn, params = hf.functional(normalised)
    with pytest.raises((ValueError, RuntimeError), match="eval"):
        list(example_gradients(hf.supervised(fn, nn.functional.cross_entropy), params, (X, Y)))


def test_an_example_whose_targets_are_all_ignored_has_the_gradient_zero() -> None:
    targets = Y.clone()
    targets[2] = -100
    (block,) = example_gradients(LOSS, PARAMS, (X, targets))
    assert not any(bool(leaf[2].any()) for leaf in block.values())


def test_a_model_without_vmap_is_a_loop() -> None:
    def branching(params: Any, batch: Any) -> torch.Tensor:
        return params["w"] * batch.sum() if float(batch.sum()) > 0 else params["w"] * 2.0

    params, batch = {"w": torch.ones((), dtype=torch.float64)}, torch.tensor([-1.0, 3.0])
    with pytest.raises(RuntimeError, match="looks at values of tensors.*examples_per_chunk=1"):
        list(example_gradients(branching, params, batch))
    found = joined(list(example_gradients(branching, params, batch, examples_per_chunk=1)))
    assert found["w"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("targets", "message"),
    [(Y + 3, "a target is the class"), (Y[:, None], "an axis that the outputs do not have")],
)
def test_an_error_of_the_loss_is_told_instead_of_the_one_of_vmap(
    targets: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(example_gradients(LOSS, PARAMS, (X, targets)))


def test_a_list_of_targets_is_mapped_by_a_loop_only() -> None:
    """Inside vmap, each example would have the targets of all."""

    def criterion(outputs: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, torch.stack(targets))

    loss = hf.supervised(MODEL_FN, criterion)
    with pytest.raises(ValueError, match="a list with an entry for each example"):
        list(example_gradients(loss, PARAMS, (X, list(Y))))
    found = joined(list(example_gradients(loss, PARAMS, (X, list(Y)), examples_per_chunk=1)))
    right = joined(list(example_gradients(LOSS, PARAMS, (X, Y))))
    torch.testing.assert_close(found, right)
