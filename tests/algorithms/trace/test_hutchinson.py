from __future__ import annotations

import math

import pytest
import torch

import hessfunc as hf
from tests.reference.spectra import symmetric

MATRIX = symmetric(torch.linspace(-1, 4, 80))
LIKE = {"a": torch.zeros(3, 10).double(), "b": torch.zeros(50).double()}


def variance_of_a_probe(kind: str) -> float:
    n = len(MATRIX)
    squares = float(MATRIX.square().sum())
    match kind:
        case "signs":
            return 2 * (squares - float(MATRIX.diagonal().square().sum()))
        case "normal":
            return 2 * squares
        case _:
            return 2 * n / (n + 2) * (squares - float(MATRIX.trace()) ** 2 / n)


@pytest.mark.parametrize("kind", ["signs", "normal", "sphere"])
def test_mean_and_variance_are_those_of_the_formula(kind: str) -> None:
    found = hf.hutchinson(hf.dense(MATRIX), LIKE, kind=kind, max_matvecs=4000, seed=0)
    error = math.sqrt(variance_of_a_probe(kind) / 4000)
    assert found.value == pytest.approx(float(MATRIX.trace()), abs=4 * error)
    assert float(found.samples.var()) == pytest.approx(variance_of_a_probe(kind), rel=0.15)
    assert found.stderr == pytest.approx(error, rel=0.1)


def test_parts_of_leaves_sum_to_the_value() -> None:
    found = hf.hutchinson(hf.dense(MATRIX), LIKE, kind="signs", max_matvecs=2000, seed=0)
    assert list(found.by_leaf) == ["a", "b"]
    assert sum(found.by_leaf.values()) == pytest.approx(found.value, rel=1e-12)
    assert found.by_leaf["a"] == pytest.approx(float(MATRIX.diagonal()[:30].sum()), abs=2)


def test_interval_covers_at_its_level() -> None:
    matvec, trace = hf.dense(MATRIX), float(MATRIX.trace())
    runs = [hf.hutchinson(matvec, LIKE, max_matvecs=40, seed=seed) for seed in range(400)]
    for level, least, most in [(0.95, 0.92, 0.985), (0.5, 0.44, 0.6)]:
        covered = sum(low <= trace <= high for low, high in (r.interval(level) for r in runs))
        assert least <= covered / len(runs) <= most


@pytest.mark.parametrize("tolerance", [{"rtol": 0.05}, {"atol": 5.0}])
def test_stops_at_the_tolerance(tolerance: dict[str, float]) -> None:
    found = hf.hutchinson(
        hf.dense(MATRIX), LIKE, kind="signs", max_matvecs=5000, seed=0, **tolerance
    )
    low, high = found.interval()
    wanted = tolerance.get("atol", 0.05 * abs(found.value))
    assert (high - low) / 2 <= wanted
    assert found.reason.startswith("converged")
    assert found.matvecs < 5000


def test_budget_is_kept_and_said() -> None:
    found = hf.hutchinson(hf.dense(MATRIX), LIKE, rtol=1e-6, max_matvecs=25, seed=0)
    assert (found.matvecs, found.passes, len(found.samples)) == (25, 3, 25)
    assert "budget exhausted after 25 matvecs" in found.reason


def test_block_size_changes_nothing_but_the_passes() -> None:
    ten = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=30, seed=5)
    one = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=30, block_size=1, seed=5)
    torch.testing.assert_close(ten.samples, one.samples)
    assert (ten.passes, one.passes) == (3, 30)


def test_signs_are_exact_on_a_diagonal_matrix() -> None:
    matvec = hf.dense(torch.arange(1.0, 6.0).diag())
    found = hf.hutchinson(matvec, torch.zeros(5), kind="signs", rtol=1e-4, max_matvecs=50, seed=0)
    assert found.value == 15.0
    assert found.interval() == pytest.approx((15.0, 15.0), abs=1e-4)
    assert found.matvecs == 20


def test_callback_stops() -> None:
    found = hf.hutchinson(
        hf.dense(MATRIX), LIKE, max_matvecs=70, callback=lambda running: running.matvecs >= 20
    )
    assert found.matvecs == 20
    assert "callback" in found.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -0.1}, "rtol=-0.1"),
        ({"max_matvecs": 1}, "max_matvecs=1: it must be at least 2"),
        ({"kind": "uniform"}, "kind='uniform': choose"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.hutchinson(hf.dense(MATRIX), LIKE, **options)


def test_bad_level() -> None:
    with pytest.raises(ValueError, match="level=95"):
        hf.hutchinson(hf.dense(MATRIX), LIKE).interval(95)


@pytest.mark.parametrize("kind", ["signs", "sphere"])
def test_deflated_is_unbiased_and_far_less_noisy(kind: str) -> None:
    spectrum = torch.cat([torch.tensor([50.0, -30.0, 20.0]), torch.linspace(0, 1, 77)])
    matrix = symmetric(spectrum)
    top = hf.lanczos(hf.dense(matrix), LIKE, k=3, seed=0)
    options = {"kind": kind, "max_matvecs": 2000, "seed": 1}
    plain = hf.hutchinson(hf.dense(matrix), LIKE, **options)
    found = hf.hutchinson(hf.dense(matrix), LIKE, deflate=top, **options)
    assert found.stderr < plain.stderr / 10
    assert found.value == pytest.approx(float(matrix.trace()), abs=4 * found.stderr)
    assert sum(found.by_leaf.values()) == pytest.approx(found.value, rel=1e-10)
    assert found.by_leaf["a"] == pytest.approx(float(matrix.diagonal()[:30].sum()), abs=1)
    assert found.squared_frobenius is not None
    assert found.squared_frobenius.value == pytest.approx(float(matrix.square().sum()), rel=1e-2)


def test_deflated_by_vectors_that_have_not_converged_is_unbiased() -> None:
    top = hf.lanczos(hf.dense(MATRIX), LIKE, k=3, max_matvecs=10, rtol=1e-12, seed=0)
    assert not bool(top.converged.all())
    found = hf.hutchinson(
        hf.dense(MATRIX), LIKE, kind="signs", deflate=top, max_matvecs=3000, seed=1
    )
    assert found.value == pytest.approx(float(MATRIX.trace()), abs=4 * found.stderr)


def test_squared_frobenius_norm_from_the_same_products() -> None:
    found = hf.hutchinson(hf.dense(MATRIX), LIKE, kind="signs", max_matvecs=500, seed=1)
    norm = found.squared_frobenius
    assert norm is not None
    low, high = norm.interval(0.99)
    assert low <= float(MATRIX.square().sum()) <= high
    assert high - low < 0.2 * norm.value


def test_all_eigenpairs_leave_nothing_to_estimate() -> None:
    matvec, like = hf.dense(torch.eye(3)), torch.zeros(3)
    everything = hf.lanczos(matvec, like, k=3, seed=0)
    with pytest.raises(ValueError, match="deflate.values.sum"):
        hf.hutchinson(matvec, like, deflate=everything)


def test_the_seed_of_the_eigenpairs_may_be_that_of_the_probes() -> None:
    spectrum = torch.where(torch.arange(200) < 20, 1.0, 1e-8).double()
    like, covered = torch.zeros(200).double(), 0
    for seed in range(200):
        top = hf.lanczos(lambda v: v * spectrum, like, k=1, rtol=1e-2, seed=seed)
        found = hf.hutchinson(
            lambda v: v * spectrum, like, deflate=top, kind="sphere", max_matvecs=30, seed=seed
        )
        low, high = found.interval()
        covered += low <= float(spectrum.sum()) <= high
    assert covered / 200 > 0.92


def test_a_known_part_is_added_exactly() -> None:
    known = {
        "a": torch.linspace(0, 1, 30, dtype=torch.float64).view(3, 10),
        "b": torch.full((50,), 2.0).double(),
    }
    alone = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=40, seed=0)
    found = hf.hutchinson(hf.dense(MATRIX), LIKE, known=known, max_matvecs=40, seed=0)
    assert found.value == pytest.approx(alone.value + 15 + 100, rel=1e-12)
    assert found.stderr == pytest.approx(alone.stderr, rel=1e-9)
    assert found.by_leaf["a"] == pytest.approx(alone.by_leaf["a"] + 15, rel=1e-12)
    assert found.squared_frobenius is None


def test_a_tolerance_is_of_the_whole() -> None:
    known = {"a": torch.full((3, 10), 1e3).double(), "b": torch.zeros(50).double()}
    found = hf.hutchinson(hf.dense(MATRIX), LIKE, known=known, rtol=1e-2, max_matvecs=1000, seed=0)
    assert "converged" in found.reason
    assert found.matvecs == 20


def test_a_known_part_of_other_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="a"):
        hf.hutchinson(hf.dense(MATRIX), LIKE, known={"a": torch.zeros(3, 9), "b": torch.zeros(50)})


def test_a_known_part_that_is_not_finite_is_refused() -> None:
    known = {"a": torch.full((3, 10), math.nan).double(), "b": torch.zeros(50).double()}
    with pytest.raises(ValueError, match="known"):
        hf.hutchinson(hf.dense(MATRIX), LIKE, known=known, max_matvecs=40, seed=0)


@pytest.mark.parametrize("budget", [3, 5])
def test_random_signs_that_agree_by_chance_have_an_error(budget: int) -> None:
    """On pairs that are swapped, all samples are the same with probability 2^(1 - p)."""
    A = torch.zeros(40, 40, dtype=torch.float64)
    A[0, 1] = A[1, 0] = 1
    like, covered = torch.zeros(40, dtype=torch.float64), 0
    for seed in range(100):
        low, high = hf.hutchinson(hf.dense(A), like, max_matvecs=budget, seed=seed).interval(0.95)
        covered += low <= 0 <= high
    assert covered >= 93
