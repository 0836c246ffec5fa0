"""Objects that hold tensors are opened, rebuilt and named."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import hessfunc as hf
from hessfunc.containers import (
    batch_leaves,
    is_array,
    leaf_paths,
    mapped,
    number_of,
    opened,
    tensors_in,
)
from tests.containers import OBJECTS, Pair

X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6)


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_rebuilt_with_other_leaves_and_stays_as_it_was(name: str) -> None:
    batch = OBJECTS[name](X, Y)
    leaves, rebuilt = opened(batch, "batch")
    assert [leaf for leaf in leaves if leaf is X or leaf is Y] == [X, Y]
    made = rebuilt(leaf + 1 if leaf is X or leaf is Y else leaf for leaf in leaves)
    assert type(made) is type(batch)
    assert torch.equal(made.x, X + 1)
    assert torch.equal(made.y, Y + 1)
    assert batch.x is X
    assert batch.y is Y


def test_paths_are_expressions_that_reach_the_leaves() -> None:
    batch = {"pair": Pair(X, Y), "more": [SimpleNamespace(deep=(X,)), 3]}
    for path, leaf in zip(leaf_paths(batch, "batch"), batch_leaves(batch), strict=True):
        assert eval(path, {"batch": batch}) is leaf


def test_an_object_met_twice_is_one_object_when_it_is_rebuilt() -> None:
    shared = SimpleNamespace(x=X)
    leaves, rebuilt = opened([shared, shared], "batch")
    assert len(leaves) == 1
    first, second = rebuilt([Y])
    assert first is second
    assert first.x is Y


def test_objects_are_opened_down_to_some_depth() -> None:
    def nested(depth: int) -> Any:
        return SimpleNamespace(inner=nested(depth - 1)) if depth else X

    leaves, _ = opened(nested(16), "batch")
    assert [leaf is X for leaf in leaves] == [True]
    with pytest.raises(TypeError, match="holds tensors"):
        opened(nested(17), "batch")


def test_a_map_sees_tensors_alone() -> None:
    made = mapped(torch.neg, {"x": X, "size": 3, "name": "text"}, "batch")
    assert torch.equal(made["x"], -X)
    assert (made["size"], made["name"]) == (3, "text")
    without = {"size": 3}
    assert mapped(torch.neg, without, "batch") is without


def test_a_leaf_may_be_chosen() -> None:
    leaves, _ = opened([Pair(X, Y), X], "batch", is_leaf=lambda part: isinstance(part, Pair))
    assert isinstance(leaves[0], Pair)
    assert leaves[1] is X


@pytest.mark.parametrize(
    "hiding", [{Y}, iter([Y]), (lambda y: lambda: y)(Y), np.array([Y, None], dtype=object)]
)
def test_tensors_that_are_out_of_reach_are_refused_and_count_as_one_leaf(hiding: Any) -> None:
    with pytest.raises(TypeError, match=r"outputs\[1\] is a .* that holds tensors"):
        opened([X, hiding], "outputs")
    assert len(batch_leaves([X, hiding])) == 2


def test_arrays_are_tensors_and_numbers_of_numpy() -> None:
    assert is_array(X)
    assert is_array(np.zeros(3))
    assert not is_array(np.array([None]))
    assert not is_array([1.0])


def test_tensors_in_nested_containers_are_found() -> None:
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    found = list(tensors_in({"first": [a, (b, "text")], "second": {c}, "third": None}))
    assert [id(x) for x in found] == [id(a), id(b), id(c)]


def test_the_number_of_batches_of_an_iterable_data_set_is_unknown() -> None:
    class Numbers(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.arange(4.0))

    loader = DataLoader(Numbers(), batch_size=2)
    assert number_of(loader) is None
    assert number_of([1, 2, 3]) == 3
    params = {"w": torch.ones(())}
    matvec = hf.over_batches(hf.hvp(lambda p, b: (b * p["w"] ** 2).mean()))(params, loader)
    assert float(hf.matrix(matvec, params)) == 3.0
