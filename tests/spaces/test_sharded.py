"""Every algorithm on vectors that are cut over ranks does what it does on one."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.trees import leaves
from tests.distributed import problems
from tests.distributed.problems import difference
from tests.distributed.ranks import Ranks


def algorithm_differs_by(name: str, ranks: int) -> tuple[float, float]:
    """How far all results, and eigenvalues alone, are from those of one process."""
    matrix = problems.symmetric(positive=name == "xnystrace")
    matvec, like = problems.as_matvec(matrix), problems.like()
    space = hf.sharded(like, problems.mesh(ranks))
    run = problems.ALGORITHMS[name]
    wanted, found = run(matvec, like, seed=7), run(matvec, like, seed=7, space=space)
    of_values = 0.0
    if isinstance(found, hf.results.Eigenpairs):
        assert found.vectors.shape == (len(found.values), space.width)
        # An eigenvector is known up to its sign.
        whole = torch.cat([x.flatten(1) for x in leaves(space.gathered(found.vectors))], 1)
        plain = torch.cat([x.flatten(1) for x in leaves(wanted.vectors)], 1)
        signs = (whole * plain).sum(1).sign()[:, None]
        found = dataclasses.replace(found, vectors=signs * whole)
        wanted = dataclasses.replace(wanted, vectors=plain)
        of_values = difference(found.values, wanted.values)
    return difference(found, wanted), of_values


@pytest.mark.parametrize("name", problems.ALGORITHMS)
def test_algorithms_find_what_one_process_finds(name: str, two: Ranks, four: Ranks) -> None:
    for ranks, size in ((two, 2), (four, 4)):
        for error, of_values in ranks.run(algorithm_differs_by, name, size):
            assert error < 1e-8 if "lanczos" in name or "power" in name else error < 1e-10
            assert of_values < 1e-10


def solver_differs_by(name: str, ranks: int) -> float:
    matvec = problems.as_matvec(problems.symmetric(positive=True))
    b = problems.vector()
    run = problems.SOLVERS[name]
    wanted = run(matvec, b)
    found = run(matvec, b, space=hf.sharded(b, problems.mesh(ranks)))
    return difference(found.x, wanted.x)


@pytest.mark.parametrize("name", problems.SOLVERS)
def test_solvers_find_what_one_process_finds(name: str, two: Ranks, four: Ranks) -> None:
    for ranks, size in ((two, 2), (four, 4)):
        assert max(ranks.run(solver_differs_by, name, size)) < 1e-10


def probes_of(kind: str, ranks: int) -> tuple[Tensor, Tensor]:
    like = problems.like(211)
    space = hf.sharded(like, problems.mesh(ranks))
    rows = space.probes([0, 5, 2], kind=kind, seed=3)
    whole = torch.cat([x.flatten(1) for x in leaves(space.gathered(rows))], 1)
    alone = torch.cat([hf.random_like(like, 6, kind=kind, seed=3)[x].flatten(1) for x in like], 1)
    return whole, alone[[0, 5, 2]]


@pytest.mark.parametrize("kind", ["signs", "normal", "sphere"])
def test_a_seed_gives_the_same_probes_on_any_number_of_ranks(
    kind: str, two: Ranks, three: Ranks
) -> None:
    for ranks, size in ((two, 2), (three, 3)):
        for whole, alone in ranks.run(probes_of, kind, size):
            torch.testing.assert_close(whole, alone, rtol=1e-12, atol=0.0)


def a_drawn_seed() -> int | None:
    like = problems.like()
    space = hf.sharded(like, problems.mesh(2))
    return hf.hutchinson(problems.as_matvec(problems.symmetric()), like, space=space).seed


def test_ranks_draw_one_seed(two: Ranks) -> None:
    first, second = two.run(a_drawn_seed)
    assert first == second
    assert two.run(a_drawn_seed)[0] != first


def widths(ranks: int) -> tuple[int, int]:
    space = hf.sharded(problems.like(), problems.mesh(ranks))
    return space.width, space.n


def test_each_rank_holds_an_even_part(four: Ranks) -> None:
    assert sorted(four.run(widths, 4)) == [(9, 37), (9, 37), (9, 37), (10, 37)]


def more_ranks_than_entries() -> float:
    matrix = problems.symmetric(2)
    like = {"w": torch.zeros(2, dtype=torch.float64)}
    space = hf.sharded(like, problems.mesh(3))
    top = hf.lanczos(lambda block: {"w": block["w"] @ matrix}, like, k=1, space=space)
    return float(abs(top.values[0]) - torch.linalg.eigvalsh(matrix).abs().max())


def test_a_rank_may_hold_nothing(three: Ranks) -> None:
    assert max(map(abs, three.run(more_ranks_than_entries))) < 1e-12


def of_other_leaves(rank_with_more: int) -> None:
    import torch.distributed as dist

    like = problems.like(38 if dist.get_rank() == rank_with_more else 37)
    hf.sharded(like, problems.mesh(2))


def test_other_leaves_on_one_rank_are_an_error_on_all(two: Ranks) -> None:
    for outcome in two.outcomes(of_other_leaves, 1):
        assert outcome.error is not None
        assert "the ranks disagree on the number of entries" in outcome.error
        assert "rank 0 has 37, rank 1 has 38" in outcome.error


def start_again_from_vectors() -> tuple[int, int]:
    matvec, like = problems.as_matvec(problems.symmetric()), problems.like()
    space = hf.sharded(like, problems.mesh(2))
    first = hf.lanczos(matvec, like, k=3, rtol=1e-8, space=space, seed=0)
    again = hf.lanczos(
        matvec, like, k=3, block_size=3, rtol=1e-7, space=space, seed=0, start=first.vectors
    )
    trace = hf.hutchinson(matvec, like, deflate=first, space=space, seed=1, max_matvecs=40)
    assert abs(float(trace.value) - float(problems.symmetric().trace())) < 4 * float(trace.stderr)
    return first.matvecs, again.matvecs


def test_vectors_of_a_result_are_taken_up(two: Ranks) -> None:
    first, again = two.run(start_again_from_vectors)[0]
    assert again < first


def infinite(rank: int) -> None:
    like = problems.like()
    space = hf.sharded(like, problems.mesh(2))

    def matvec(block: Any) -> Any:
        # The last columns, which the last rank alone holds.
        return block | {"d": block["d"] / 0.0}

    hf.lanczos(matvec, like, k=2, space=space, seed=0)


def test_a_product_that_is_not_finite_is_an_error_on_all(two: Ranks) -> None:
    for outcome in two.outcomes(infinite, 1):
        assert outcome.error is not None
        assert outcome.error.startswith("NonFiniteError: a product has entries that are NaN")
        assert outcome.error.endswith("at d")


def stopped_by_one(rank: int) -> tuple[str, int]:
    import torch.distributed as dist

    def callback(found: hf.results.Eigenpairs) -> bool:
        return dist.get_rank() == rank and found.matvecs >= 6

    like = problems.like()
    found = hf.lanczos(
        problems.as_matvec(problems.symmetric()),
        like,
        k=3,
        seed=0,
        callback=callback,
        space=hf.sharded(like, problems.mesh(2)),
    )
    return found.reason, found.matvecs


def test_a_callback_that_stops_on_one_rank_stops_all(two: Ranks) -> None:
    first, second = two.run(stopped_by_one, 1)
    assert first == second
    assert first[0] == "stopped by the callback"


def raises_on_one(rank: int) -> None:
    import torch.distributed as dist

    def callback(found: hf.results.Eigenpairs) -> None:
        if dist.get_rank() == rank:
            raise OSError("the disk is full")

    like = problems.like()
    space = hf.sharded(like, problems.mesh(2))
    matvec = problems.as_matvec(problems.symmetric())
    hf.lanczos(matvec, like, k=3, seed=0, callback=callback, space=space)


def test_a_callback_that_raises_on_one_rank_is_an_error_on_all(two: Ranks) -> None:
    first, second = two.outcomes(raises_on_one, 1)
    assert second.error == "OSError: the disk is full"
    assert first.error is not None
    assert first.error.endswith("rank 1: OSError: the disk is full")


def watched_by_the_first(name: str, option: str) -> int:
    import torch.distributed as dist

    like = problems.like()
    seen: list[Any] = []
    problems.ALGORITHMS[name](
        problems.as_matvec(problems.symmetric(positive=True)),
        like,
        seed=0,
        **{option: seen.append if dist.get_rank() == 0 else None},
        space=hf.sharded(like, problems.mesh(2)),
    )
    return len(seen)


@pytest.mark.parametrize("option", ["callback", "progress"])
@pytest.mark.parametrize("name", ["power_iteration", "lanczos", "xtrace", "xdiag", "slq"])
def test_a_function_of_one_rank_alone(name: str, option: str, two: Ranks) -> None:
    first, second = two.run(watched_by_the_first, name, option)
    assert first > 0
    assert second == 0


def multiply_on_one() -> None:
    import torch.distributed as dist

    def matvec(block: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError("no such disk here")
        return block

    like = problems.like()
    hf.lanczos(matvec, like, k=2, seed=0, space=hf.sharded(like, problems.mesh(2)))


def test_a_matvec_that_raises_on_one_rank_is_an_error_on_all(two: Ranks) -> None:
    first, second = two.outcomes(multiply_on_one)
    assert second.error == "OSError: no such disk here"
    assert first.error is not None
    assert first.error.endswith("rank 1: OSError: no such disk here")


def seeded_by_rank() -> None:
    import torch.distributed as dist

    like = problems.like()
    space = hf.sharded(like, problems.mesh(2))
    matvec = problems.as_matvec(problems.symmetric())
    hf.hutchinson(matvec, like, seed=10 + dist.get_rank(), space=space)


def test_another_seed_on_one_rank_is_an_error_on_all(two: Ranks) -> None:
    for outcome in two.outcomes(seeded_by_rank):
        assert outcome.error is not None
        assert "the ranks disagree on seed: rank 0 has 10, rank 1 has 11" in outcome.error


def in_little_memory(name: str) -> str:
    from hessfunc import memory

    like = problems.like()
    space = hf.sharded(like, problems.mesh(2))
    # Widths are 18 and 19, and as many vectors must fit on both.
    plain, memory.available_memory = memory.available_memory, lambda device: 2 * 19 * 8 * 16 * 7
    try:
        run = problems.ALGORITHMS[name]
        return str(run(problems.as_matvec(problems.symmetric()), like, seed=0, space=space).reason)
    finally:
        memory.available_memory = plain


@pytest.mark.parametrize("name", ["xtrace", "xdiag", "slq", "lanczos"])
def test_ranks_of_unlike_widths_choose_the_same_sizes(name: str, two: Ranks) -> None:
    first, second = two.run(in_little_memory, name)
    assert first == second


def with_draws_differs_by(name: str, ranks: int) -> float:
    loss, params = problems.model_and_loss()
    batches = problems.batches()
    space = hf.sharded(params, problems.mesh(ranks))
    draws = hf.draws(hf.hvp(loss), seed=3)(params, batches)
    if name == "sampled_trace":
        run = partial(hf.sampled_trace, draws, params, probes=2, max_matvecs=40, seed=5)
        return difference(run(space=space), run())
    matvec = hf.over_batches(hf.hvp(loss))(params, batches)
    run = partial(
        hf.stochastic_power_iteration, matvec, draws, params, rtol=1e-3, max_matvecs=60, seed=5
    )
    return difference(run(space=space).values, run().values)


@pytest.mark.parametrize("name", ["sampled_trace", "stochastic_power_iteration"])
def test_random_batches_find_what_they_find_on_one_process(
    name: str, two: Ranks, four: Ranks
) -> None:
    assert max(two.run(with_draws_differs_by, name, 2)) < 1e-10
    assert max(four.run(with_draws_differs_by, name, 4)) < 1e-10
