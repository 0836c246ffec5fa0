"""Traces from random batches; the noise of the data told from that of the probes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.algorithms.results.sampled import SampledEstimate
from hessfunc.algorithms.trace.sampled import sampled_trace
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.nets import mlp
from hessfunc.randomness import seeded
from hessfunc.transforms.batches.draws import draws
from hessfunc.trees import Matvec
from tests.cases import case, closed_form, dense_hessian
from tests.graphs import counted_graphs
from tests.reference.spectra import symmetric

N = 40
LIKE = torch.zeros(N).double()
LEAVES = {"a": torch.zeros(10).double(), "b": torch.zeros(30).double()}
BASE = symmetric(torch.linspace(0, 3, N))


def drawn_from(
    matrices: Tensor, weights: list[float] | None = None, *, replace: bool = True, seed: int = 0
) -> Callable[[int], Matvec]:
    """Random ones of some matrices, by default with replacement."""
    weight = (lambda _: 1.0) if weights is None else weights.__getitem__
    return draws(
        lambda params, b: lambda block: block @ matrices[b],
        weight=weight,
        replace=replace,
        seed=seed,
    )(LIKE, range(len(matrices)))


def shifted(spread: float, count: int = 30) -> Tensor:
    """``BASE + s_b I``, with shifts of mean 0: traces differ, off-diagonal entries do not."""
    shifts = torch.linspace(-1, 1, count, dtype=torch.float64) * spread
    return BASE + shifts[:, None, None] * torch.eye(N, dtype=torch.float64)


def variance_of_traces(matrices: Tensor) -> float:
    """Between batches that are drawn alike."""
    return float(matrices.diagonal(dim1=1, dim2=2).sum(1).var(correction=0))


def variance_of_a_probe(matrix: Tensor) -> float:
    """Of random signs."""
    return 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())


def test_unbiased_for_the_weighted_mean_of_unequal_batches() -> None:
    problem = closed_form("linear regression")
    X, y = problem.batch
    X = torch.cat([8 * X[:1], X[1:]])
    batches = list(zip(X.split([1, 2, 5, 7]), y.split([1, 2, 5, 7]), strict=True))
    some = draws(hf.hvp(problem.loss), seed=0)(problem.params, batches)
    found = sampled_trace(some, problem.params, probes=2, max_matvecs=400, seed=1)
    traces = [2 / len(x) * float(x.square().sum()) for x, _ in batches]
    assert found.value == pytest.approx(2 / 15 * float(X.square().sum()), abs=3 * found.stderr)
    # The mean that forgets the sizes is told apart.
    assert abs(found.value - sum(traces) / 4) > 5 * found.stderr


def test_a_real_net_against_its_dense_hessian() -> None:
    found = case("mlp")
    batches = hf.microbatches(found.batch, 4)
    some = draws(hf.hvp(found.loss), seed=0)(found.params, batches)
    estimate = sampled_trace(some, found.params, probes=3, max_matvecs=450, seed=1)
    low, high = estimate.interval(0.99)
    assert low < float(dense_hessian("mlp").trace()) < high
    assert estimate.stderr < 0.15 * estimate.value


def test_parts_of_leaves_sum_to_the_value() -> None:
    found = sampled_trace(lambda _: hf.dense(BASE), LEAVES, probes=2, max_matvecs=1000, seed=0)
    assert list(found.by_leaf) == ["a", "b"]
    assert sum(found.by_leaf.values()) == pytest.approx(found.value, rel=1e-12)
    assert found.by_leaf["a"] == pytest.approx(float(BASE.diagonal()[:10].sum()), abs=1)
    assert found.value == pytest.approx(float(found.samples.mean()), rel=1e-12)


def test_draws_and_probes_of_one_seed_are_independent() -> None:
    matrices = shifted(1.0, count=2)
    found = [
        sampled_trace(drawn_from(matrices, seed=s), LIKE, probes=1, max_matvecs=40, seed=s)
        for s in range(50)
    ]
    variance = variance_of_traces(matrices) + variance_of_a_probe(BASE)
    error = math.sqrt(variance / (40 * 50))
    mean = sum(one.value for one in found) / 50
    assert mean == pytest.approx(float(BASE.trace()), abs=4 * error)
    pooled = torch.cat([one.samples for one in found])
    assert float(pooled.var()) == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize(("spread", "probes"), [(0.05, 2), (0.3, 2), (0.3, 5), (2.0, 2)])
def test_components_are_those_of_the_matrices(spread: float, probes: int) -> None:
    matrices, m = shifted(spread), 800
    found = sampled_trace(drawn_from(matrices), LIKE, probes=probes, max_matvecs=m * probes, seed=0)
    within, between = variance_of_a_probe(BASE), variance_of_traces(matrices)
    assert found.variance_probes == pytest.approx(within, rel=0.2)
    error = 4 * (between + within / probes) * math.sqrt(2 / m)
    assert found.variance_data == pytest.approx(between, abs=error)
    assert found.stderr**2 == pytest.approx((between + within / probes) / m, rel=0.25)


def test_probe_noise_within_unequal_batches_is_averaged_by_their_weight() -> None:
    matrices, weights = torch.stack([BASE, 3 * BASE]), [0.8, 0.2]
    found = sampled_trace(drawn_from(matrices, weights), LIKE, probes=2, max_matvecs=2000, seed=0)
    within = (0.8 + 0.2 * 9) * variance_of_a_probe(BASE)
    between = 0.8 * 0.2 * (2 * float(BASE.trace())) ** 2
    assert found.variance_probes == pytest.approx(within, rel=0.25)
    assert found.variance_data == pytest.approx(between, rel=0.15)
    assert found.value == pytest.approx(1.4 * float(BASE.trace()), abs=4 * found.stderr)


def test_equal_batches_have_no_noise_of_data() -> None:
    found = [
        sampled_trace(drawn_from(BASE.expand(5, N, N)), LIKE, probes=3, max_matvecs=300, seed=seed)
        for seed in range(10)
    ]
    within = variance_of_a_probe(BASE)
    # Cut off at 0, it is 0 in about half of the runs, and small otherwise.
    assert sum(one.variance_data == 0 for one in found) >= 2
    assert max(one.variance_data for one in found) < 0.2 * within
    assert sum(one.variance_probes for one in found) / 10 == pytest.approx(within, rel=0.1)


def test_diagonal_batches_have_no_noise_of_probes() -> None:
    diagonals = torch.rand(7, N, dtype=torch.float64).diag_embed()
    found = sampled_trace(drawn_from(diagonals), LIKE, probes=2, max_matvecs=1000, seed=0)
    assert found.variance_probes < 1e-20 * found.variance_data
    assert found.data_share == pytest.approx(1)
    assert found.variance_data == pytest.approx(variance_of_traces(diagonals), rel=0.2)


def test_one_probe_a_draw_does_not_tell_them_apart() -> None:
    found = sampled_trace(drawn_from(shifted(0.3)), LIKE, max_matvecs=500, seed=0)
    assert math.isnan(found.variance_probes)
    assert math.isnan(found.variance_data)
    assert "take 2 probes per draw" in found.advice
    total = variance_of_traces(shifted(0.3)) + variance_of_a_probe(BASE)
    assert found.stderr**2 == pytest.approx(total / 500, rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.02, 0.3, 2.0], ids=["of probes", "of both", "of data"])
@pytest.mark.parametrize("probes", [1, 2])
def test_interval_covers_both_kinds_of_noise(spread: float, probes: int) -> None:
    matrices = shifted(spread)
    trace, covered, runs = float(BASE.trace()), 0, 200
    for seed in range(runs):
        some = drawn_from(matrices, seed=seed)
        found = sampled_trace(some, LIKE, probes=probes, max_matvecs=20 * probes, seed=seed)
        assert (found.draws, found.degrees) == (20, 19)
        low, high = found.interval()
        covered += low <= trace <= high
    assert 0.91 <= covered / runs < 0.995


def test_interval_of_the_probes_alone_would_not_cover() -> None:
    """The standard error must be that of batch means: within a batch, probes are not all noise."""
    found = sampled_trace(drawn_from(shifted(2.0)), LIKE, probes=10, max_matvecs=1000, seed=0)
    as_if_independent = math.sqrt(
        (found.variance_data + found.variance_probes) / (found.draws * found.probes_per_draw)
    )
    assert found.stderr > 2 * as_if_independent


def test_advice_of_runs_at_both_extremes() -> None:
    noisy_data, noisy_probes = (
        sampled_trace(drawn_from(shifted(spread)), LIKE, probes=4, max_matvecs=400, seed=0)
        for spread in (5.0, 0.02)
    )
    assert "take more draws, with fewer probes" in noisy_data.advice
    assert noisy_data.data_share > 0.95
    assert "take more probes per draw" in noisy_probes.advice
    assert noisy_probes.data_share < 0.3


@pytest.mark.parametrize("tolerance", [{"rtol": 0.05}, {"atol": 3.0}])
def test_stops_at_the_tolerance(tolerance: dict[str, float]) -> None:
    some = drawn_from(shifted(0.3), replace=False)
    found = sampled_trace(some, LIKE, probes=2, max_matvecs=10_000, seed=0, **tolerance)
    low, high = found.interval()
    assert (high - low) / 2 <= tolerance.get("atol", 0.05 * abs(found.value))
    assert found.reason.startswith("converged")
    assert found.matvecs == 2 * found.draws < 10_000


def test_budget_is_kept_in_whole_draws() -> None:
    found = sampled_trace(drawn_from(shifted(0.3)), LIKE, probes=3, max_matvecs=100, seed=0)
    assert (found.matvecs, found.passes, found.draws, len(found.samples)) == (99, 33, 33, 33)
    assert "budget exhausted after 99 of 100 matvecs" in found.reason


def test_block_size_changes_nothing_but_the_passes() -> None:
    some = drawn_from(shifted(0.3))
    whole = sampled_trace(some, LIKE, probes=5, max_matvecs=50, seed=3)
    cut = sampled_trace(some, LIKE, probes=5, max_matvecs=50, block_size=2, seed=3)
    torch.testing.assert_close(whole.samples, cut.samples)
    assert (whole.passes, cut.passes) == (10, 30)


def test_one_graph_lives_at_a_time() -> None:
    found = case("conv")

    def most_held(count: int) -> int:
        some = draws(hf.hvp(found.loss), seed=0)(found.params, [found.batch] * 3)
        with counted_graphs() as graphs:
            sampled_trace(some, found.params, max_matvecs=count, seed=0)
            assert len(graphs.alive) == 0
        return graphs.most

    assert most_held(12) == most_held(2) > 0


def test_callback_stops_and_the_result_is_saved(tmp_path: Path) -> None:
    some = drawn_from(shifted(0.3))
    found = sampled_trace(some, LIKE, probes=2, callback=lambda running: running.draws >= 10)
    assert found.draws == 10
    assert "callback" in found.reason
    found.save(tmp_path / "sampled.npz")
    loaded = hf.load(tmp_path / "sampled.npz")
    assert isinstance(loaded, SampledEstimate)
    assert loaded.advice == found.advice
    assert loaded.interval() == found.interval()
    again = sampled_trace(some, LIKE, probes=2, max_matvecs=20, seed=found.seed)
    assert torch.equal(again.samples, found.samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -0.1}, "rtol=-0.1"),
        ({"probes": 0}, "probes=0: it must be at least 1"),
        ({"probes": 3, "max_matvecs": 5}, "max_matvecs=5: it must be at least 6"),
        ({"block_size": 0}, "block_size"),
        ({"kind": "uniform"}, "kind='uniform': choose"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampled_trace(drawn_from(shifted(0.3)), LIKE, **options)


# Of one batch, in gradients: its graph, and a product with it.
GRAPH, PRODUCT = 2.5, 2


def mean_square(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared error of one-hot labels."""
    return (logits - F.one_hot(labels, 10)).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "criterion"), [([64, 32, 10], mean_square), ([64, 10], F.cross_entropy)]
)
def test_a_tenth_of_the_gradients_where_no_example_stands_out(
    widths: list[int], criterion: Callable[[Tensor, Tensor], Tensor]
) -> None:
    with seeded(0):
        model_fn, params = hf.functional(mlp(widths))
    batches = digits().batches(18)
    curvature = hf.hvp(hf.supervised(model_fn, criterion))
    some = draws(curvature, seed=0)(params, batches)

    whole = hf.hutchinson(some.full, params, max_matvecs=20, block_size=20, seed=0)
    gradients = len(batches) * (whole.passes * GRAPH + whole.matvecs * PRODUCT)

    probes = 3
    count = int(gradients / 10 / (GRAPH + probes * PRODUCT))
    found = sampled_trace(some, params, probes=probes, max_matvecs=count * probes, seed=1)
    assert found.draws * (GRAPH + probes * PRODUCT) <= gradients / 10
    assert found.stderr < whole.stderr
    together = math.hypot(found.stderr, whole.stderr)
    assert found.value == pytest.approx(whole.value, abs=3 * together)


def heavy(count: int, share: float, off_diagonal: float = 0.0) -> Tensor:
    """Matrices of which the first has this share of the sum of the traces; their mean is 1."""
    traces = torch.full((count,), (1 - share) * count / (count - 1), dtype=torch.float64)
    traces[0] = share * count
    one = torch.eye(N, dtype=torch.float64) + off_diagonal * (1 - torch.eye(N).double())
    return traces[:, None, None] / N * one


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("off_diagonal", [0.0, 0.5])
@pytest.mark.parametrize("count", [5, 20, 60, 500])
def test_converged_is_said_of_what_covers(count: int, off_diagonal: float, replace: bool) -> None:
    matrices = heavy(count, 0.9, off_diagonal)
    wrong = 0
    for seed in range(10):
        some = drawn_from(matrices, replace=replace, seed=seed)
        found = sampled_trace(some, LIKE, probes=2, rtol=0.2, max_matvecs=150, seed=seed)
        low, high = found.interval()
        covers = low - 1e-9 <= 1.0 <= high + 1e-9
        wrong += found.reason.startswith("converged") and not covers
        assert not (found.reason.startswith("converged") and (replace or found.draws < count))
        if (high - low) / 2 <= 0.2 * abs(found.value) and not found.every_batch_was_drawn:
            assert "not certified" in found.reason
    assert wrong <= 2


def test_a_full_pass_knows_the_batches_without_error() -> None:
    some = drawn_from(heavy(20, 0.9), replace=False)
    found = sampled_trace(some, LIKE, probes=2, max_matvecs=40, seed=0)
    assert found.value == pytest.approx(1.0, rel=1e-12)
    low, high = found.interval()
    assert high - low < 1e-10
    assert (found.population, found.correction, found.variance_probes < 1e-20) == (20, 0.0, True)
    assert "All 20 batches were drawn" in found.advice


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples_that_agree_before_all_batches_are_drawn_give_no_interval(
    dtype: torch.dtype, replace: bool
) -> None:
    """The matrices without the heavy one are equal, and diagonal."""
    matrices, like = heavy(500, 0.9), LIKE.to(dtype)
    for seed in range(5):
        some = draws(
            lambda params, b: lambda v: (v.double() @ matrices[b]).to(dtype),
            weight=lambda _: 1.0,
            replace=replace,
            seed=seed,
        )(like, range(500))
        for options in ({}, {"rtol": 0.1}):
            found = sampled_trace(some, like, probes=2, max_matvecs=100, seed=seed, **options)
            if found.value > 0.5:
                continue
            assert found.interval() == (-math.inf, math.inf)
            assert "not certified, and the interval is not known" in found.reason
            assert {part.stderr for part in found.by_leaf.values()} == {math.inf}
            assert "were not drawn can differ: draw all" in found.advice
            assert ("of 500" in repr(found)) == (not replace)
            # The second of these has no interval either, nor has the mean.
            other = sampled_trace(some, like, probes=2, max_matvecs=100, seed=seed + 9)
            assert math.isinf(hf.pool([replaced(found, None), replaced(other, None)]).stderr)


def replaced(found: SampledEstimate, draws_seed: int | None) -> SampledEstimate:
    return dataclasses.replace(found, draws_seed=draws_seed)


def test_few_random_signs_that_agree_by_chance_give_no_interval() -> None:
    swap, like = torch.tensor([[0.0, 1], [1, 0]]).double(), torch.zeros(2).double()
    covered = 0
    for seed in range(100):
        some = drawn_from(swap[None], replace=False, seed=seed)
        low, high = sampled_trace(some, like, probes=2, max_matvecs=4, seed=seed).interval()
        covered += low <= 0 <= high
    assert covered >= 93


def test_no_advice_promises_that_draws_that_were_not_made_change_nothing() -> None:
    for seed in range(10):
        some = drawn_from(heavy(50, 0.9), replace=False, seed=seed)
        found = sampled_trace(some, LIKE, probes=2, max_matvecs=20, seed=seed)
        assert "nothing" not in found.advice
        if found.variance_data == 0:
            assert "draw all 50, with max_matvecs=100" in found.advice


def test_a_pass_that_is_more_than_half_done_is_finished() -> None:
    some = drawn_from(shifted(0.01), replace=False)
    found = sampled_trace(some, LIKE, probes=2, rtol=0.5, max_matvecs=100, seed=0)
    assert (found.draws, found.reason.startswith("converged")) == (30, True)
    short = sampled_trace(some, LIKE, probes=2, rtol=0.5, max_matvecs=50, seed=0)
    assert "10 of 30 batches were not drawn" in short.reason


def test_one_probe_a_draw_converges_after_two_passes() -> None:
    some = drawn_from(shifted(0.01, count=12), replace=False)
    found = sampled_trace(some, LIKE, probes=1, rtol=0.5, max_matvecs=100, seed=0)
    assert (found.draws, found.reason.startswith("converged")) == (24, True)


def test_estimates_from_the_same_batches_are_not_pooled() -> None:
    runs = [
        sampled_trace(drawn_from(shifted(1.0), seed=draw), LIKE, max_matvecs=20, seed=seed)
        for draw, seed in [(0, 0), (0, 1), (1, 2)]
    ]
    assert hf.pool(runs[1:]).matvecs == 40
    with pytest.raises(ValueError, match="the seed of their draws"):
        hf.pool(runs)


@pytest.mark.parametrize("count", [15, 30, 40])
def test_intervals_without_replacement_cover_and_are_narrower(count: int) -> None:
    """At 30 draws of 30 batches only the noise of the probes is left."""
    matrices, covered, ratios = shifted(1.0), 0, []
    for seed in range(60):
        found, other = (
            sampled_trace(
                drawn_from(matrices, replace=replace, seed=seed),
                LIKE,
                probes=2,
                max_matvecs=2 * count,
                seed=seed,
            )
            for replace in (False, True)
        )
        low, high = found.interval()
        covered += low <= float(BASE.trace()) <= high
        ratios.append(found.stderr / other.stderr)
    assert covered >= 53
    assert sorted(ratios)[30] < 0.95


def test_intervals_of_heavy_batches_cover_where_a_proxy_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    traces = (2 * torch.randn(300, generator=generator, dtype=torch.float64)).exp()
    rough = traces * (0.5 * torch.randn(300, generator=generator, dtype=torch.float64)).exp()
    true, covered, seeds = float(traces.mean()), {"proxy": 0, "none": 0}, 25
    for name in covered:
        for seed in range(seeds):
            some = draws(
                lambda params, b: lambda block: block * traces[b] / 4,
                weight=lambda _: 1.0,
                proxy=(lambda _, b: float(rough[b])) if name == "proxy" else None,
                seed=seed,
            )(torch.zeros(4).double(), range(300))
            found = sampled_trace(some, torch.zeros(4).double(), max_matvecs=40, seed=seed)
            low, high = found.interval(0.95)
            covered[name] += low <= true <= high
            assert not found.reason.startswith("converged")
    # At a coverage of 95 %, fewer than 21 of 25 have the probability 1 %.
    assert covered["proxy"] >= 21
    assert covered["none"] < covered["proxy"]
