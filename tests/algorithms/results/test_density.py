"""Means, counts and bounds of a spectral density."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import hessfunc as hf
from tests.algorithms.densities import (
    BRACKETED,
    DECAY,
    GEOMETRIC,
    SPECTRUM,
    VECTOR,
    diagonal,
    of_nodes,
    shares,
    spiked_spectrum,
)
from tests.reference.spectra import spiked, symmetric


def test_pdf_integrates_to_one_and_states_its_width() -> None:
    found = hf.slq(hf.dense(symmetric(SPECTRUM)), VECTOR, probes=2, steps=30, seed=0)
    assert found.width == pytest.approx(0.04, rel=0.05)
    for width in (None, 0.1):
        grid = torch.linspace(-3, 5, 4001).double()
        assert float(torch.trapezoid(found.pdf(grid, width), grid)) == pytest.approx(1, abs=1e-6)
    assert float(found.grid()[0]) < -1.1
    assert float(found.grid()[-1]) > 3.1
    with pytest.raises(ValueError, match="width=0"):
        found.pdf(grid, 0)


@pytest.mark.parametrize(("probes", "steps"), [(1, 40), (4, 40)])
def test_bounds_of_the_distribution_function_hold(probes: int, steps: int) -> None:
    spectrum = torch.linalg.eigvalsh(spiked(500))
    matvec, like = hf.dense(spiked(500)), torch.zeros(500).double()
    points = torch.linspace(-0.5, 7, 60).double()
    exact = (spectrum <= points[:, None]).double().mean(1)
    held = torch.zeros(60)
    for seed in range(40):
        found = hf.slq(matvec, like, probes=probes, steps=steps, seed=seed)
        lower, upper = found.cdf_bounds(points)
        held += (lower <= exact) & (exact <= upper)
        assert ((upper - lower).mean() < 0.15).all()
    assert (held / 40).mean() > 0.95
    assert (held / 40).min() > 0.85


# The edge of the bulk is 4, and the outliers are near s + s / (s - 1) = 4.5, 5.33 and 6.25.
@pytest.mark.parametrize(("probes", "within"), [(2, 20), (4, 20), (16, 5)])
def test_count_of_outliers_is_bracketed(probes: int, within: int) -> None:
    assert int((spiked_spectrum() > 4.1).sum()) == 3
    for seed in range(10):
        found = diagonal(spiked_spectrum(), probes, 40, seed)
        low, high = found.count_above(4.1)
        assert low == 3
        assert 3 <= high <= 3 + within
        assert found.count_above(-1.0)[1] == 2000
        assert found.count_above(10.0)[0] == 0


def test_ritz_values_of_one_probe_are_counted_whatever_their_weight() -> None:
    found = of_nodes([[0, 1, 5, 6], [0, 1, 1, 1]], [[0.5, 0.5, 1e-9, 1e-9], [0.5, 0.5, 0, 0]], 1000)
    assert found.count_above(4)[0] == 2
    assert found.count_above(5.5)[0] == 1
    # Two values of one probe are up to 4, and nodes of weight 0 are none.
    assert found.count_above(4, level=1 - 1e-12)[1] <= 998


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spectrum", "width"),
    [
        (lambda: torch.linspace(-1, 1, 2000, dtype=torch.float64), 0.056),
        (lambda: spiked_spectrum(), 0.036),
    ],
    ids=["flat", "spiked"],
)
def test_band_of_slq_holds_at_1000_points(
    spectrum: Callable[[], torch.Tensor], width: float
) -> None:
    eigenvalues = spectrum()
    points = torch.linspace(
        float(eigenvalues.min()), float(eigenvalues.max()), 1000, dtype=torch.float64
    )
    exact = torch.searchsorted(eigenvalues, points, right=True) / 2000
    runs, held, widths = 8, 0, 0.0
    for seed in range(runs):
        found = diagonal(eigenvalues, probes=16, steps=70, seed=seed)
        lower, upper = found.cdf_bounds(points, simultaneous=True)
        held += int(((lower <= exact) & (exact <= upper)).all())
        widths += float((upper - lower).mean()) / runs
    assert held == runs
    assert widths == pytest.approx(width, abs=0.002)


def test_bounds_refuse_a_percentage() -> None:
    found = hf.slq(hf.dense(symmetric(SPECTRUM)), VECTOR, steps=5, seed=0)
    with pytest.raises(ValueError, match="level=95"):
        found.cdf_bounds(torch.zeros(1), 95)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_band_refuses_a_level_that_is_no_probability(level: float) -> None:
    found = of_nodes([[0.0]], [[1.0]], 5)
    with pytest.raises(ValueError, match="choose a probability between 0 and 1"):
        found.cdf_bounds(torch.zeros(1), level, simultaneous=True)


def test_log_determinant_and_effective_dimension_are_those_of_the_eigenvalues() -> None:
    matrix = symmetric(0.05 + 4 * GEOMETRIC)
    eigenvalues, basis = torch.linalg.eigh(matrix)
    like = torch.zeros(300, dtype=torch.float64)
    found = hf.slq(hf.dense(matrix), like, probes=8, steps=60, seed=0)
    square = (hf.random_like(like, 8, kind="sphere", seed=0) @ basis).square()

    log = found.mean(torch.log)
    torch.testing.assert_close(log.samples, square @ eigenvalues.log() / 300)
    low, high = (300 * end for end in log.interval(0.999))
    assert low < float(torch.logdet(matrix)) < high
    assert high - low < 0.2 * abs(float(torch.logdet(matrix)))

    ratio = eigenvalues / (eigenvalues + 0.1)
    dimension = found.effective_dimension(0.1)
    torch.testing.assert_close(dimension.samples, square @ ratio)
    low, high = dimension.interval(0.999)
    assert low < float(ratio.sum()) < high
    assert high - low < 0.2 * float(ratio.sum())
    assert dimension.reason == "effective dimension at damping 0.1"


def test_pooled_means_keep_their_bounds() -> None:
    f, ends = BRACKETED["ratio"]
    estimates = [diagonal(DECAY, 1, 5, seed).mean(f, **ends) for seed in range(2)]
    pooled = hf.pool(estimates)
    both = [estimate.bounds or (0.0, 0.0) for estimate in estimates]
    assert pooled.bounds == pytest.approx([sum(b[i] for b in both) / 2 for i in (0, 1)])
    assert pooled.interval()[0] < float(f(DECAY).mean()) < pooled.interval()[1]


OUTLIERS = torch.tensor([100.0, 60, 30, 20, 10, 8, 6, 5, 4, 3], dtype=torch.float64)


def test_counts_of_an_exhausted_krylov_space_are_narrow() -> None:
    spectrum = torch.cat([OUTLIERS, torch.zeros(990, dtype=torch.float64)])
    for seed in range(5):
        found = diagonal(spectrum, 1, 40, seed)
        low, high = found.count_above(0.5)
        assert low == 10
        assert 10 <= high <= 50
        assert found.count_above(200.0) == (0, 0)
        assert found.count_above(-1.0) == (1000, 1000)
    few = diagonal(torch.arange(1.0, 8.0, dtype=torch.float64), 1, 7, seed=0)
    assert few.count_above(4.5) == (3, 3)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_counts_cover_at_their_level(level: float) -> None:
    # Shares of exact quadratures with 30 of 200 eigenvalues above 0.5, in two clusters.
    spectrum = torch.cat([torch.zeros(170), torch.ones(30)]).double()
    draws, held = 1500, 0
    for w in shares(draws, 2, 200):
        two = torch.stack([w[:, :170].sum(1), w[:, 170:].sum(1)], dim=1)
        found = of_nodes([[0.0, 1.0]] * 2, two.tolist(), len(spectrum))
        low, high = found.count_above(0.5, level)
        held += low <= 30 <= high
    assert held / draws == pytest.approx(level, abs=0.02)


def test_mean_tells_where_it_comes_from() -> None:
    found = of_nodes([[1.0, 3.0], [1.0, 3.0]], [[0.5, 0.5], [0.25, 0.75]], 10).mean(lambda x: x)
    assert found.value == pytest.approx(2.25)
    assert found.samples.tolist() == [2.0, 2.5]
    # The mean square of -1.25 and 0.75 with weights 3/8 and 5/8.
    assert found.stderr == pytest.approx(math.sqrt(2 * 0.9375 / (2 * 12 - 2)))
    assert found.degrees == int(20 * 0.9375**2 / (0.375 * 1.25**4 + 0.625 * 0.75**4))
    assert (found.matvecs, found.passes, found.seed, found.by_leaf) == (7, 5, 3, {})
    assert found.reason == "mean of f over the spectrum"


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_effective_dimension_refuses_a_damping(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping={damping}: choose a positive number"):
        of_nodes([[1.0]], [[1.0]], 5).effective_dimension(damping)


def test_effective_dimension_is_of_a_positive_matrix() -> None:
    with pytest.raises(ValueError, match="such as `ggnvp"):
        of_nodes([[-1e-5, 1.0]], [[0.5, 0.5]], 10).effective_dimension(1.0)
    # Rounding of float32, which would stand out at a damping as small.
    found = of_nodes([[-1e-6, 1.0]], [[0.5, 0.5]], 10).effective_dimension(1e-6)
    assert found.value == pytest.approx(5, rel=1e-5)
    assert of_nodes([[-5.0, 1.0]], [[0.0, 1.0]], 10).effective_dimension(1.0).value == 5


def test_semi_definite_matrix_in_float32_has_an_effective_dimension() -> None:
    factor = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    matvec = hf.batched(lambda v: factor.mT @ (factor @ v))
    found = hf.slq(matvec, torch.zeros(300), probes=4, steps=60, seed=0)
    assert float(found.nodes.min()) < 0
    low, high = found.effective_dimension(1.0).interval(0.999)
    assert low < 40 < high + 0.2


def test_rounding_is_not_counted_as_an_eigenvalue() -> None:
    torch.manual_seed(0)
    factor = torch.randn(300, 10)
    matrix = factor @ factor.mT
    for seed in range(5):
        found = hf.slq(hf.dense(matrix), torch.zeros(300), probes=2, steps=40, seed=seed)
        low, high = found.count_above(1e-3)
        assert low <= 10 <= high


def test_bounds_take_a_number_and_refuse_nan() -> None:
    matrix = symmetric(torch.linspace(-1, 1, 60))
    found = hf.slq(hf.dense(matrix), torch.zeros(60).double(), seed=0)
    low, high = found.cdf_bounds(0.0)
    assert float(low) <= 0.5 <= float(high)
    with pytest.raises(ValueError, match="NaN"):
        found.count_above(float("nan"))
