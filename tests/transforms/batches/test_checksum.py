"""Examples that differ between two passes are seen."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

import hessfunc as hf
from tests.cases import case
from tests.reference import rows


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Ten examples, changed a little each time they are read."""

    def __init__(self, augment: Callable[[Tensor], Tensor]) -> None:
        self.inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).double()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.augment(self.inputs[index]), torch.tensor(index % 3)


def whole(x: Tensor) -> Tensor:
    """No augmentation."""
    return x


def two_products(loader: Any) -> None:
    """Two passes over a loader of (inputs, targets)."""
    found = case("mlp")
    matvec = hf.over_batches(hf.hvp(found.loss))(found.params, loader)
    v = hf.random_like(found.params, 1, seed=0)
    for _ in range(2):
        matvec(v)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Examples(whole), batch_size=4),
        DataLoader(Examples(whole), batch_size=4, drop_last=True),
        DataLoader(Examples(whole), batch_size=4, shuffle=True),
        DataLoader(Examples(whole), batch_size=5, shuffle=True, drop_last=True),
    ],
    ids=["in order", "drop_last", "shuffle", "nothing dropped"],
)
def test_passes_over_the_same_examples_are_accepted(loader: Any) -> None:
    two_products(loader)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Examples(whole), batch_size=4, shuffle=True, drop_last=True),
        DataLoader(Examples(lambda x: x + 1e-3 * torch.randn(3)), batch_size=4),
        DataLoader(Examples(lambda x: x * torch.randint(2, (1,)).mul(2).sub(1)), batch_size=4),
        DataLoader(
            Examples(whole), batch_size=4, sampler=RandomSampler(range(10), replacement=True)
        ),
    ],
    ids=["shuffle with drop_last", "noise", "flips", "with replacement"],
)
def test_passes_over_other_examples_are_refused(loader: Any) -> None:
    with pytest.raises(ValueError, match="saw different examples.*`drop_last`.*list.loader."):
        two_products(loader)


class Passes:
    """Another list of batches at each pass."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.passes.pop(0))


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([(X, Y)], [(X[:5], Y[:5])]),
        ([(X, Y)], [(X, Y), (X[:1], Y[:1])]),
        ([(X, Y)], [(X, Y.flip(0))]),
        ([(X, Y)], [(X.flip(1), Y)]),
        ([(X, Y)], [(-X, Y)]),
        ([(X, Y)], [(torch.cat([X[:5], X[:1]]), Y)]),
        ([(X, Y)], [(X + 1e-7, Y)]),
    ],
    ids=["left out", "repeated", "other targets", "mirrored", "negated", "replaced", "moved"],
)
def test_any_change_of_the_examples_is_seen(first: list[Any], second: list[Any]) -> None:
    with pytest.raises(ValueError, match="saw different examples"):
        two_products(Passes(first, second))


def test_inputs_and_targets_that_change_places_are_seen() -> None:
    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (params["w"] * x - y).square().mean()

    x, y = torch.randn(2, 6, 3).double()
    params = {"w": torch.ones(3).double()}
    matvec = hf.over_batches(hf.hvp(loss))(params, Passes([(x, y)], [(y, x)]))
    matvec({"w": torch.ones(1, 3).double()})
    with pytest.raises(ValueError, match="saw different examples"):
        matvec({"w": torch.ones(1, 3).double()})


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_order_of_examples_whose_sum_is_zero_does_not_matter(scale: float) -> None:
    x = torch.randn(20, 3).double() * scale
    x = torch.cat([x, -x])
    y = torch.zeros(40, dtype=torch.int64)
    order = torch.randperm(40)
    two_products(Passes([(x, y)], hf.microbatches((x[order], y[order]), 7)))


@pytest.mark.parametrize("absent", [float("nan"), float("inf"), float("-inf")])
def test_entries_that_are_not_finite_and_not_used_are_no_difference(absent: float) -> None:
    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (x @ params["w"])[y.isfinite()].square().mean()

    params, y = {"w": torch.ones(3).double()}, torch.tensor([1.0, absent, 2.0, absent, 0.0, 1.0])
    matvec = hf.over_batches(hf.hvp(loss))(params, [(X, y)])
    first, again = (rows(matvec({"w": torch.ones(1, 3).double()})) for _ in range(2))
    assert torch.equal(first, again)
