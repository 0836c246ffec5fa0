"""Parts of the data on ranks: each example is read once, or the ranks are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

import hessfunc as hf
from hessfunc.transforms.batches import shards
from tests.distributed import problems
from tests.distributed.problems import data, error
from tests.distributed.ranks import Ranks


def loader_of(kind: str) -> DataLoader[Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if kind == "subset":
        return DataLoader(Subset(data(23), range(rank, 23, ranks)), batch_size=4)
    if kind == "same":
        return DataLoader(data(), batch_size=4)
    if kind == "others":
        return DataLoader(Subset(data(), range(12 * rank, 12 * (rank + 1))), batch_size=4)
    if kind == "shuffled":
        return DataLoader(data(22 + rank), batch_size=4)
    count = {"even": 24, "padded": 23, "hidden": 23}[kind]
    sampler: Any = DistributedSampler(data(count), ranks, rank, shuffle=False)
    if kind == "hidden":
        # Such as the samplers of other libraries, which are of no class that is known here.
        sampler = list(sampler)
    return DataLoader(data(count), batch_size=4, sampler=sampler)


def loaded(kind: str, lying: Any) -> float:
    loss, params = problems.model_and_loss()
    count = 23 if kind == "subset" else 24
    wanted = hf.hvp(loss)(params, data(count)[:])
    block = hf.random_like(params, 2, seed=1)
    curvature = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2), data=lying)
    return error(curvature(params, loader_of(kind))(block), wanted(block))


@pytest.mark.parametrize(
    ("kind", "loader"),
    [("subset", "sharded"), ("even", "sharded"), ("others", "sharded"), ("same", "replicated")],
)
def test_whoever_divides_the_data_all_of_it_counts_once(kind: str, loader: str, two: Ranks) -> None:
    assert max(two.run(loaded, kind, loader)) < 1e-12


@pytest.mark.parametrize(
    ("kind", "loader", "message"),
    [
        ("padded", "sharded", "the DistributedSampler pads 23 examples to 24, so some count twice"),
        ("hidden", "sharded", "the ranks read 24 examples of 23, so some count twice"),
        ("same", "sharded", "two ranks read the same examples, which would count twice"),
        ("others", "replicated", "the ranks read different batches"),
        ("shuffled", "replicated", "the ranks read different batches"),
        ("same", "halves", "choose 'replicated' or 'sharded'"),
    ],
)
def test_data_that_would_not_count_once_are_refused(
    kind: str, loader: str, message: str, two: Ranks
) -> None:
    for outcome in two.outcomes(loaded, kind, loader):
        assert outcome.error is not None
        assert outcome.error.startswith("ValueError")
        assert message in outcome.error


def in_an_order_of_its_own(kind: str) -> None:
    loss, params = problems.model_and_loss()
    second, batches = dist.get_rank() == 1, problems.batches()[:6]
    if kind == "reversed" and second:
        batches = batches[::-1]
    if kind == "cut" and second:
        batches = [part for batch in batches for part in hf.microbatches(batch, 2)]
    loader: Any = batches
    if kind == "shuffled":
        torch.manual_seed(dist.get_rank())
        loader = DataLoader(data(), batch_size=4, shuffle=True)
    matvec = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2), keep=kind == "reversed")
    matvec(params, loader)(hf.random_like(params, 1, seed=0))


@pytest.mark.parametrize("kind", ["shuffled", "reversed", "cut"])
def test_another_order_on_one_rank_is_refused(kind: str, two: Ranks) -> None:
    for outcome in two.outcomes(in_an_order_of_its_own, kind):
        assert outcome.error is not None
        assert "or the same in another order" in outcome.error


def sharded_by_the_wrong_rank() -> None:
    loss, params = problems.model_and_loss()
    mine = problems.batches()[dist.get_rank() :: 4]
    curvature = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2, 2), data="sharded")
    curvature(params, mine)(hf.random_like(params, 1, seed=0))


def test_a_loader_that_is_sharded_over_probes_as_well_is_refused(four: Ranks) -> None:
    for outcome in four.outcomes(sharded_by_the_wrong_rank):
        assert outcome.error is not None
        assert "shard the loader over the axis 'data'" in outcome.error


class Moved:
    """A loader inside of another object, as libraries have them."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return iter(self.loader)


def with_sampler(kind: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = 23 if kind in ("in a batch sampler", "wrapped") else 24
    sampler: Any = DistributedSampler(
        data(count), 4 if kind == "of four" else ranks, rank, shuffle=kind == "epochs"
    )
    if kind == "epochs":
        sampler.set_epoch(rank)
    loader: Any = DataLoader(data(count), batch_size=4, sampler=sampler)
    if kind == "in a batch sampler":
        loader = DataLoader(data(count), batch_sampler=BatchSampler(sampler, 4, False))
    if kind == "wrapped":
        loader = Moved(loader)
    loss, params = problems.model_and_loss()
    curvature = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2), data="sharded")
    curvature(params, loader)(hf.random_like(params, 1, seed=0))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("in a batch sampler", "pads 23 examples to 24"),
        ("wrapped", "pads 23 examples to 24"),
        ("of four", "divides the data into 4 parts, but the mesh has 2"),
        ("epochs", "the ranks disagree on the sampler's seed and epoch"),
    ],
)
def test_samplers_that_do_not_divide_the_data_are_refused(
    kind: str, message: str, two: Ranks
) -> None:
    for outcome in two.outcomes(with_sampler, kind):
        assert outcome.error is not None
        assert message in outcome.error


def two_of_three_alike() -> None:
    loss, params = problems.model_and_loss()
    part = problems.batches()[min(dist.get_rank(), 1) :: 2]
    curvature = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(3), data="sharded")
    curvature(params, part)(hf.random_like(params, 1, seed=0))


def test_two_ranks_with_one_part_are_told(three: Ranks) -> None:
    for outcome in three.outcomes(two_of_three_alike):
        assert outcome.error is not None
        assert "two ranks read the same examples" in outcome.error


class EveryOther(Sampler[int]):
    """A sampler of the user's own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 6, 2))


class Unsized(Dataset[Tensor]):
    """A data set without a length."""

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([float(i)])


def test_a_sampler_over_data_of_unknown_length_is_refused() -> None:
    loader = DataLoader(Unsized(), sampler=EveryOther())
    with pytest.raises(ValueError, match="EveryOther may pad.*give the data set a `__len__`"):
        shards.refuse_sampler(loader, 2)
    sized = DataLoader(TensorDataset(torch.zeros(6, 1)), sampler=EveryOther())
    assert shards.examples_of(sized) == 6
    # There is no sampler that could pad a stream.
    assert shards.examples_of(DataLoader(Stream())) is None


class Stream(IterableDataset[Tensor]):
    """A data set that is read in its own order."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(1)
