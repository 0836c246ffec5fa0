"""Random batches whose mean is the curvature of all, in proportion to their weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc.transforms.batches.draws import Draws, draws
from tests.cases import case, closed_form, dense_hessian
from tests.graphs import counted_graphs
from tests.reference import matrix, relative_error

SIZES = [1, 2, 5, 7]


def unequal(name: str = "softmax regression") -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """A problem with a known Hessian, its 15 examples in batches of 1, 2, 5 and 7."""
    problem = closed_form(name)
    cut = (tensor.split(SIZES) for tensor in problem.batch)
    return problem, list(zip(*cut, strict=True))


def scaled(params: Any, batch: float) -> Any:
    """The curvature ``batch * I``, so that a product says of which batch it is."""
    return lambda block: {"w": batch * block["w"]}


def made(weights: list[float], seed: int = 0, *, replace: bool = True) -> Draws:
    """Draws of the batches 0, 1, ..., of these weights."""
    curvature = draws(scaled, weight=weights.__getitem__, replace=replace, seed=seed)
    return curvature({"w": torch.zeros(1)}, list(range(len(weights))))


# Unbiased


def test_mean_of_draws_is_the_weighted_mean_of_unequal_batches() -> None:
    problem, batches = unequal()
    found = draws(hf.hvp(problem.loss), replace=True, seed=0)(problem.params, batches)
    each = torch.stack(
        [matrix(hf.hvp(problem.loss)(problem.params, b), problem.params) for b in batches]
    )
    drawn = each[[found.batch(i) for i in range(4000)]]
    error = (drawn.mean(0) - problem.hessian).abs()
    standard_error = drawn.std(0) / 4000**0.5
    assert (error <= 5 * standard_error + 1e-12).all()
    # The plain mean over batches is told apart: it is off by far more.
    assert ((each.mean(0) - problem.hessian).abs() > 10 * standard_error).any()


def test_a_draw_is_the_matvec_of_its_batch() -> None:
    problem, batches = unequal()
    found = draws(hf.hvp(problem.loss), replace=True, seed=3)(problem.params, batches)
    for i in range(8):
        expected = hf.hvp(problem.loss)(problem.params, batches[found.batch(i)])
        expected = matrix(expected, problem.params)
        assert relative_error(matrix(found(i), problem.params), expected) < 1e-12
    assert len({found.batch(i) for i in range(8)}) > 1


def test_full_is_exact_and_batches_are_counted() -> None:
    problem, batches = unequal()
    found = draws(hf.hvp(problem.loss))(problem.params, batches)
    assert relative_error(matrix(found.full, problem.params), problem.hessian) < 1e-10
    assert found.batches == 4


def test_batches_are_drawn_in_proportion_to_their_weight_and_never_without() -> None:
    found = made([0, 1, 0, 3, 6, 0])
    counts = Counter(found.batch(i) for i in range(10_000))
    assert set(counts) == {1, 3, 4}
    for place, share in [(1, 0.1), (3, 0.3), (4, 0.6)]:
        spread = (share * (1 - share) * 10_000) ** 0.5
        assert abs(counts[place] - share * 10_000) < 4 * spread


def test_draws_are_independent_of_one_another() -> None:
    found = made([1.0] * 10)
    places = torch.tensor([found.batch(i) for i in range(20_000)])
    pairs = torch.bincount(10 * places[:-1] + places[1:], minlength=100)
    expected = 19_999 / 100
    chi_squared = float(((pairs - expected) ** 2 / expected).sum())
    # 99 degrees of freedom: mean 99, standard deviation 14.
    assert 50 < chi_squared < 160


def test_weights_of_tokens_are_those_of_the_mean() -> None:
    found = case("tied head")
    inputs, targets = found.batch
    targets = targets.clone()
    targets[0, 1:] = targets[1] = -100
    batches = hf.microbatches((inputs, targets), 1)

    def tokens(batch: Any) -> Tensor:
        return (batch[1] != -100).sum()

    some = draws(hf.hvp(found.loss), weight=tokens, seed=0)(found.params, batches)
    assert {some.batch(i) for i in range(200)} == {0, 2}
    assert some.ends == (1.0, 1.0, 6.0)


@pytest.mark.parametrize("weights", [[1.0] * 7, [1.0, 2.0, 0.0, 5.0, 7.0]])
def test_a_pass_without_replacement_has_every_batch_once_and_the_exact_mean(
    weights: list[float],
) -> None:
    found = made(weights, replace=False)
    some = [place for place, weight in enumerate(weights) if weight]
    assert found.population == len(some)
    v = {"w": torch.ones(1, 1, dtype=torch.float64)}
    for turn in range(3):
        indices = range(turn * len(some), (turn + 1) * len(some))
        assert sorted(found.batch(i) for i in indices) == some
        mean = sum(float(found(i)(v)["w"]) for i in indices) / len(some)
        weighted = sum(place * weight for place, weight in enumerate(weights)) / sum(weights)
        assert mean == pytest.approx(weighted, rel=1e-12)


def test_orders_of_passes_differ_and_every_order_is_as_likely() -> None:
    firsts = Counter(made([1.0] * 4, seed, replace=False).batch(0) for seed in range(2000))
    assert all(abs(count - 500) < 4 * (2000 * 3 / 16) ** 0.5 for count in firsts.values())
    found = made([1.0] * 20, replace=False)
    passes = {tuple(found.batch(20 * turn + i) for i in range(20)) for turn in range(5)}
    assert len(passes) == 5


# Reproducible


def test_a_draw_is_a_function_of_seed_and_index_alone() -> None:
    found, again, other = made([1.0] * 50, 7), made([1.0] * 50, 7), made([1.0] * 50, 8)
    in_order = [found.batch(i) for i in range(100)]
    torch.rand(3)
    backwards = [again.batch(i) for i in reversed(range(100))]
    assert in_order == backwards[::-1]
    assert in_order != [other.batch(i) for i in range(100)]
    state = torch.random.get_rng_state()
    found(0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_fresh_seed_is_recorded() -> None:
    first, second = (draws(scaled)({"w": torch.zeros(1)}, [torch.ones(2)] * 3) for _ in range(2))
    assert first.seed != second.seed
    again = draws(scaled, seed=first.seed)({"w": torch.zeros(1)}, [torch.ones(2)] * 3)
    assert [first.batch(i) for i in range(50)] == [again.batch(i) for i in range(50)]


# Graphs, and what changes


def test_one_graph_lives_at_a_time() -> None:
    found = case("conv")
    v = hf.random_like(found.params, 1, seed=0)

    def most_held(count: int) -> int:
        with counted_graphs() as graphs:
            some = draws(hf.hvp(found.loss), seed=0)(found.params, [found.batch] * 3)
            for i in range(count):
                some(i)(v)
            assert len(graphs.alive) == 0
        return graphs.most

    assert most_held(6) == most_held(1) > 0


def test_parameters_changed_in_place_are_refused() -> None:
    params = {"w": torch.ones(2)}
    some = draws(scaled, seed=0)(params, [torch.ones(2)] * 3)
    params["w"].add_(1)
    with pytest.raises(RuntimeError, match="has changed in place"):
        some(0)


def test_batch_statistics_are_refused_on_several_batches_alone() -> None:
    found = case("batch norm, train")
    one = draws(hf.hvp(found.loss))(found.params, [found.batch])
    assert relative_error(matrix(one(0), found.params), dense_hessian("batch norm, train")) < 1e-10
    several = draws(hf.hvp(found.loss))(found.params, [found.batch] * 2)
    with pytest.raises(ValueError, match="BatchNorm|batch statistics"):
        several(0)


# What is refused


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2), "a DataLoader.*list.loader."),
        (iter([torch.ones(2)]), "a list_iterator.*list.loader."),
        (({} for _ in range(2)), "a generator.*microbatches"),
        (torch.ones(4, 2), "a single batch"),
        ((torch.ones(4, 2), torch.ones(4)), "a single batch"),
        ({"x": torch.ones(4, 2)}, "a single batch"),
    ],
    ids=["loader", "iterator", "generator", "tensor", "pair", "mapping"],
)
def test_what_cannot_be_picked_from_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        draws(scaled)({"w": torch.zeros(1)}, batches)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "sum to zero: check that the list is not empty"),
        ([0.0, 0.0], "sum to zero"),
        ([1.0, -1.0], "is -1.0: it must be at least 0"),
        ([float("nan"), 1.0], "is nan"),
        ([float("inf"), 1.0], "is inf"),
    ],
)
def test_weights_that_are_no_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(weights)


# By a proxy


def by_proxy(proxies: list[float], weights: list[float] | None = None, seed: int = 0) -> Draws:
    """Draws of the batches 0, 1, ..., by these proxies."""
    weights = weights or [1.0] * len(proxies)
    curvature = draws(scaled, weight=weights.__getitem__, proxy=lambda _, b: proxies[b], seed=seed)
    return curvature({"w": torch.zeros(1)}, list(range(len(proxies))))


def factor(found: Draws, i: int) -> float:
    """By which the curvature of the i-th drawn batch, its index, is multiplied."""
    return float(found(i)({"w": torch.ones(1, 1)})["w"]) / found.batch(i)


def test_a_proxy_decides_how_often_a_batch_is_drawn_and_how_much_it_counts() -> None:
    proxies, weights = [1.0, 1.0, 6.0, 0.0, 3.0], [2.0, 1.0, 1.0, 1.0, 0.0]
    found = by_proxy(proxies, weights)
    shares = torch.tensor(proxies).double() * torch.tensor(weights).double() / 9
    chances = 0.8 * shares + 0.2 * torch.tensor([1.0, 1, 1, 1, 0]).double() / 4
    counts = Counter(found.batch(i) for i in range(4000))
    assert found.population is None
    assert counts[4] == 0
    for b in range(4):
        spread = float(chances[b] * (1 - chances[b]) * 4000) ** 0.5
        assert counts[b] == pytest.approx(4000 * float(chances[b]), abs=4 * spread)
        if b:
            first = next(i for i in range(4000) if found.batch(i) == b)
            expected = weights[b] / 5 / float(chances[b])
            assert factor(found, first) == pytest.approx(expected, rel=1e-6)


def test_the_mean_of_draws_by_a_proxy_is_that_of_the_examples() -> None:
    problem, batches = unequal()
    found = draws(hf.hvp(problem.loss), proxy=problem.loss, seed=0)(problem.params, batches)
    several = torch.stack([matrix(found(i), problem.params) for i in range(300)])
    error = (several.mean(0) - problem.hessian).abs()
    assert (error <= 5 * several.std(0) / 300**0.5 + 1e-12).all()


def test_a_proportional_proxy_makes_all_draws_nearly_equal() -> None:
    sizes = [float(10**b) for b in range(4)]
    curvature = draws(
        lambda _, size: lambda block: {"w": size * block["w"]},
        weight=lambda _: 1.0,
        proxy=lambda _, size: size,
        seed=1,
    )
    found = curvature({"w": torch.zeros(1)}, sizes)
    values = [float(found(i)({"w": torch.ones(1, 1)})["w"]) for i in range(200)]
    mean = sum(sizes) / 4
    # T / (B p) <= mean / 0.8, and the mean of all draws is that of the batches.
    assert max(values) <= mean / 0.8
    assert sum(values) / 200 == pytest.approx(mean, rel=0.1)


@pytest.mark.parametrize(
    ("proxies", "words"),
    [
        ([1.0, -1.0], "proxy of a batch is -1.0"),
        ([0.0, 0.0], "proxy values of the batches sum to zero"),
        ([1.0, float("nan")], "proxy of a batch is nan"),
    ],
)
def test_a_proxy_that_is_no_size_is_refused(proxies: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        by_proxy(proxies)


@pytest.mark.parametrize("value", [None, "a", torch.ones(2), 1j])
def test_a_proxy_or_weight_that_is_no_number_is_refused(value: Any) -> None:
    params = {"w": torch.zeros(1)}
    with pytest.raises(TypeError, match="the proxy of a batch must be a number, not"):
        draws(scaled, weight=lambda _: 1.0, proxy=lambda *_: value)(params, [0, 1])
    with pytest.raises(TypeError, match="the weight of a batch must be a number, not"):
        draws(scaled, weight=lambda _: value)(params, [0, 1])
