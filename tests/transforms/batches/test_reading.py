"""Passes over batches, for products and for statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.batches.reading import Passes
from tests.kronecker.cases import Net, dense, largest_error, net


def perceptron(criterion: Any = F.cross_entropy) -> Net:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    return net(make, 4, examples=7, criterion=criterion)


def parts(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(leaf.split([3, 1, 3]) for leaf in batch), strict=True))


def test_a_pass_of_other_examples_is_refused() -> None:
    passes = Passes()
    passes.add(torch.ones(3))
    passes.add(torch.ones(3))
    with pytest.raises(ValueError, match="two passes over the batches saw different examples"):
        passes.add(2 * torch.ones(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("family", [hf.kronecker.kflr, hf.kronecker.ekfac])
def test_statistics_of_batches_are_those_of_all_examples(family: Any, reduction: str) -> None:
    case = perceptron(torch.nn.CrossEntropyLoss(reduction=reduction))
    inputs, targets = case.batch
    targets = targets.argmax(1)
    # Ignored targets change the weight of the first batch, and leave out the second one.
    targets[torch.tensor([1, 3])] = -100
    batch = inputs, targets
    whole = family(case.loss, case.model)(case.params, batch)
    made = hf.over_batches(family(case.loss, case.model))(case.params, parts(batch))
    if reduction == "mean":
        # Batches without targets are left out; the inputs of their examples do not count.
        kept = [part for part in parts(batch) if (part[1] >= 0).any()]
        batch = tuple(torch.cat(leaves) for leaves in zip(*kept, strict=True))
        whole = family(case.loss, case.model)(case.params, batch)
    assert largest_error(dense(made), dense(whole)) < 1e-10


def test_a_weight_of_the_batches() -> None:
    case = perceptron(lambda outputs, targets: (outputs - targets).pow(4).mean())
    curvature = hf.kronecker.kflr(case.loss, case.model)
    made = hf.over_batches(curvature, weight=hf.examples)(case.params, parts(case.batch))
    whole = curvature(case.params, case.batch)
    assert largest_error(dense(made), dense(whole)) < 1e-10
    outer = hf.over_batches(hf.over_batches(curvature))
    nested = outer(case.params, [parts(case.batch)[:1], parts(case.batch)[1:]])
    block = hf.random_like(case.params, 2, seed=0)
    single = [
        hf.over_batches(curvature)(case.params, p)(block)
        for p in (parts(case.batch)[:1], parts(case.batch)[1:])
    ]
    for name, leaf in nested(block).items():
        torch.testing.assert_close(leaf, (3 * single[0][name] + 4 * single[1][name]) / 7)


def test_passes_of_statistics_see_the_same_examples() -> None:
    case = perceptron()

    class Shuffled(list[Any]):
        def __iter__(self) -> Any:
            self.append(self[0])
            return super().__iter__()

    with pytest.raises(ValueError, match="two passes over the batches saw different examples"):
        hf.over_batches(hf.kronecker.ekfac(case.loss, case.model))(
            case.params, Shuffled(parts(case.batch))
        )


def test_the_inverse_of_a_data_set_solves_its_systems() -> None:
    case = perceptron()
    for family in (hf.kronecker.kflr, hf.kronecker.ekfac):
        made = hf.over_batches(family(case.loss, case.model))(case.params, parts(case.batch))
        b = hf.random_like(case.params, 3, seed=0)
        x = made.inverse_matvec(b, 1e-2)
        for name, residual in hf.matvecs.shift(made, 1e-2)(x).items():
            assert float((residual - b[name]).norm() / b[name].norm()) < 1e-10
