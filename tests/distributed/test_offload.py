"""A basis that is cut over ranks, and comes to each of them from afar."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.algorithms.far import counted_copies, every_basis_is_far
from tests.distributed import problems
from tests.distributed.ranks import Ranks

RUNS = {name: run for name, run in problems.ALGORITHMS.items() if "lanczos" in name} | {
    "slq": problems.ALGORITHMS["slq"]
}


def numbers(name: str, ranks: int, far: bool) -> tuple[dict[str, Tensor], int]:
    """What the algorithm finds, by field, and the bytes that were copied."""
    space = hf.sharded(problems.like(), problems.mesh(ranks))
    matvec = problems.as_matvec(problems.symmetric())
    # Of two rows of 19 entries, and of two of 18.
    with every_basis_is_far(2 * 19 * 8) if far else nullcontext(), counted_copies() as copies:
        found = RUNS[name](matvec, problems.like(), space=space, seed=7)
    values = {item.name: getattr(found, item.name) for item in dataclasses.fields(found)}
    tensors = {field: x for field, x in values.items() if isinstance(x, Tensor)}
    return tensors | {"matvecs": torch.tensor(found.matvecs)}, sum(copies)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_find_with_a_basis_from_afar_what_they_find_without(name: str, two: Ranks) -> None:
    without, there = two.run(numbers, name, 2, False), two.run(numbers, name, 2, True)
    near, far = [found for found, _ in without], [found for found, _ in there]
    assert all(copied == 0 for _, copied in without)
    assert all(copied > 0 for _, copied in there)
    if "vectors" in near[0]:
        # Each rank has a part of an eigenvector, whose sign is that of rounding on some processors.
        parts = [(a["vectors"] * b["vectors"]).sum(1) for a, b in zip(near, far, strict=True)]
        signs = torch.stack(parts).sum(0).sign()
        far = [found | {"vectors": signs[:, None] * found["vectors"]} for found in far]
    for wanted, found in zip(near, far, strict=True):
        assert wanted.keys() == found.keys()
        for field in wanted:
            torch.testing.assert_close(found[field], wanted[field], rtol=1e-10, atol=1e-9)


def coarse(far: bool) -> Tensor:
    like = problems.like(211)
    space = hf.sharded(like, problems.mesh(2))
    matvec = problems.as_matvec(problems.symmetric(211))
    with every_basis_is_far(3 * 106 * 2) if far else nullcontext():
        return hf.lanczos(
            matvec,
            like,
            k=2,
            basis_size=9,
            basis_dtype=torch.bfloat16,
            rtol=1e-2,
            space=space,
            seed=7,
        ).values


def test_a_coarse_basis_comes_from_afar_too(two: Ranks) -> None:
    (near, same), (far, also) = two.run(coarse, False), two.run(coarse, True)
    assert torch.equal(near, same)
    assert torch.equal(far, also)
    torch.testing.assert_close(far, near, rtol=1e-2, atol=0)


def too_much_for_one() -> None:
    space = hf.sharded(problems.like(), problems.mesh(2))
    matvec = problems.as_matvec(problems.symmetric())
    # Five vectors with the next block on a rank of 18 entries, and not on one of 19.
    with every_basis_is_far():
        hf.lanczos(matvec, problems.like(), k=3, basis_bytes=6 * 18 * 8, space=space, seed=7)


def test_a_basis_that_does_not_fit_on_one_rank_is_refused_on_all(two: Ranks) -> None:
    for outcome in two.outcomes(too_much_for_one):
        assert outcome.error is not None
        assert outcome.error.startswith("MemoryError: a basis of 5 vectors of 19 entries")
