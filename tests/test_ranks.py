"""Collectives: what each rank gets, and how they fail together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hessfunc import ranks
from tests.distributed import problems
from tests.distributed.ranks import Ranks

CPU = torch.device("cpu")


def mine() -> ranks.Ranks:
    return ranks.Ranks.of(problems.mesh(dist.get_world_size()))


@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_parts_are_contiguous_and_as_even_as_possible(count: int) -> None:
    parts = ranks.Ranks("", 5, 0).parts(count)
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def collectives() -> tuple[Any, ...]:
    group, rank = mine(), dist.get_rank()
    uneven = torch.full((rank, 2), float(rank))
    return (
        group.sum(torch.tensor([1.0, rank])).tolist(),
        group.least(5 - rank, device=CPU),
        [part.tolist() for part in group.gathered(uneven, [0, 1, 2])],
        group.joined(uneven, [0, 1, 2]).tolist(),
        group.objects({"rank": rank}),
    )


def test_collectives_give_every_rank_the_same(three: Ranks) -> None:
    expected = (
        [3.0, 3.0],
        3,
        [[], [[1.0, 1.0]], [[2.0, 2.0]] * 2],
        [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]],
        [{"rank": 0}, {"rank": 1}, {"rank": 2}],
    )
    assert three.run(collectives) == [expected] * 3


def along_the_axes() -> tuple[list[float], list[float]]:
    mesh, rank = problems.mesh(2, 2), torch.tensor([float(dist.get_rank())])
    over = [ranks.Ranks.of(mesh, name).sum(rank.clone()).tolist() for name in ("data", "probe")]
    return over[0], over[1]


def test_an_axis_has_the_ranks_along_it_that_include_this_process(four: Ranks) -> None:
    # Ranks 0 1 / 2 3: the axis "data" goes down, "probe" across.
    assert four.run(along_the_axes) == [
        ([2.0], [1.0]),
        ([4.0], [1.0]),
        ([2.0], [5.0]),
        ([4.0], [5.0]),
    ]


def all_do() -> int:
    return mine().all_do(lambda: 10 // dist.get_rank(), CPU)


def test_a_rank_that_fails_stops_the_others_with_its_reason(two: Ranks) -> None:
    first, second = two.outcomes(all_do)
    assert first.error is not None
    assert first.error.startswith("ZeroDivisionError")
    assert second.error is not None
    assert "failed on another rank, so this rank stops: rank 0: ZeroDivisionError" in second.error


def agree(by: float) -> None:
    mine().agree({"k": 3, "tolerance": 1.0 + by * dist.get_rank()}, CPU)


def alike(other: bool) -> None:
    mine().alike({"names": ["a", "b" if other and dist.get_rank() else "c"]})


def test_numbers_agree_up_to_rounding_and_values_exactly(two: Ranks) -> None:
    two.run(agree, 1e-12)
    two.run(alike, False)
    for outcome in two.outcomes(agree, 1e-3):
        assert outcome.error is not None
        assert "the ranks disagree on tolerance: rank 0 has 1, rank 1 has 1.001" in outcome.error
    for outcome in two.outcomes(alike, True):
        assert outcome.error is not None
        assert "the ranks disagree on names: rank 0 has ['a', 'c'], rank 1" in outcome.error
