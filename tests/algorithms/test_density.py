from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms import density
from hessfunc.algorithms import offload as streamed
from hessfunc.algorithms.results import Density
from tests.algorithms.far import copies_are_late, counted_copies, every_basis_is_far
from tests.algorithms.spectra import spiked, symmetric

SPECTRUM = torch.linspace(-1, 3, 200)
VECTOR = torch.zeros(200, dtype=torch.float64)
GEOMETRIC = 0.9 ** torch.arange(300, dtype=torch.float64)


@cache
def spiked_spectrum() -> torch.Tensor:
    return torch.linalg.eigvalsh(spiked())


def diagonal(spectrum: torch.Tensor, probes: int, steps: int, seed: int) -> Density:
    """The density of a diagonal matrix, as good as any: a probe on the sphere has no direction."""
    matvec = hf.batched(lambda v: spectrum * v)
    return hf.slq(matvec, torch.zeros_like(spectrum), probes=probes, steps=steps, seed=seed)


def of_nodes(
    nodes: list[list[float]], weights: list[list[float]], n: int, residual: float = 0.0
) -> Density:
    where = torch.tensor(nodes, dtype=torch.float64)
    return Density(
        nodes=where,
        weights=torch.tensor(weights, dtype=torch.float64),
        residuals=torch.full_like(where, residual),
        n=n,
        matvecs=7,
        passes=5,
        reason="made up",
        seed=3,
    )


def shares(draws: int, probes: int, n: int, seed: int = 0) -> torch.Tensor:
    """Weights of exact quadratures, ``(draws, probes, n)``: squares of points on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(draws, probes, n, dtype=torch.float64, generator=generator).square()
    return square / square.sum(-1, keepdim=True)


def exact_densities(spectrum: torch.Tensor, probes: int, draws: int) -> list[Density]:
    n = len(spectrum)
    nodes = spectrum.expand(probes, n)
    return [
        Density(
            nodes=nodes,
            weights=w,
            residuals=torch.zeros_like(w),
            n=n,
            matvecs=0,
            passes=0,
            reason="exact",
            seed=None,
        )
        for w in shares(draws, probes, n)
    ]


def test_weights_sum_to_one_and_moments_are_exact() -> None:
    matrix = symmetric(SPECTRUM)
    found = hf.slq(hf.dense(matrix), VECTOR, probes=3, steps=20, seed=0)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3).double())
    probes = hf.random_like(VECTOR, 3, kind="sphere", seed=0)
    power = probes
    for degree in range(1, 12):
        power = power @ matrix
        moment = (probes * power).sum(1) / 200
        torch.testing.assert_close((found.weights * found.nodes**degree).sum(1), moment)


def test_small_diagonal_matrix_is_rebuilt() -> None:
    matvec = hf.dense(torch.tensor([1.0, 2.0, 3.0]).double().diag())
    found = hf.slq(matvec, torch.zeros(3).double(), probes=4, steps=50, seed=0)
    expected = torch.tensor([1.0, 2.0, 3.0]).double().expand(4, 3)
    torch.testing.assert_close(found.nodes, expected, atol=1e-7, rtol=0)


def test_more_steps_than_the_rank_end_early() -> None:
    spectrum = torch.cat([torch.tensor([4.0, 2.0]), torch.zeros(98)])
    found = hf.slq(
        hf.dense(symmetric(spectrum)), torch.zeros(100).double(), probes=2, steps=40, seed=0
    )
    assert found.nodes.shape == (2, 3)
    torch.testing.assert_close(
        found.nodes, torch.tensor([[0.0, 2, 4]] * 2).double(), atol=1e-12, rtol=0
    )
    assert found.matvecs == 6
    assert "exhausted after 3 steps" in found.reason


def test_probes_may_end_at_different_steps() -> None:
    # The second probe lives where A is zero, so that its Krylov space has one dimension.
    matrix = torch.arange(6.0).double().diag()

    def matvec(block: torch.Tensor) -> torch.Tensor:
        return torch.cat([block[:1] @ matrix, 0 * block[1:]])

    found = hf.slq(matvec, torch.zeros(6).double(), probes=2, steps=6, seed=0)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2).double())
    assert found.nodes[1].abs().max() == 0
    assert found.nodes[0].max() == pytest.approx(5)


def test_spikes_stand_out_of_the_bulk() -> None:
    found = hf.slq(hf.dense(spiked()), torch.zeros(2000).double(), probes=2, steps=60, seed=0)
    for nodes in found.nodes:
        assert nodes[-3:].tolist() == pytest.approx([4.5, 5.33, 6.25], abs=0.2)
        assert nodes[-4] < 4.1


def test_semicircle_has_a_constant_recurrence() -> None:
    n = 1000
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).double()
    matrix = (noise + noise.mT) / (2 * n) ** 0.5
    found = hf.slq(hf.dense(matrix), torch.zeros(n).double(), probes=8, steps=30, seed=0)
    grid = torch.linspace(-1.5, 1.5, 7).double()
    semicircle = (4 - grid.square()).sqrt() / (2 * torch.pi)
    torch.testing.assert_close(found.pdf(grid, width=0.15), semicircle, atol=0.03, rtol=0)


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


def test_all_probes_go_through_one_pass() -> None:
    found = hf.slq(hf.dense(symmetric(SPECTRUM)), VECTOR, probes=5, steps=20, seed=0)
    assert (found.matvecs, found.passes) == (100, 20)


def test_probes_that_do_not_fit_run_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    matvec = hf.dense(symmetric(SPECTRUM))
    together = hf.slq(matvec, VECTOR, probes=5, steps=20, seed=0)
    basis = 20 * 200 * 8
    monkeypatch.setattr(density, "available_to", lambda *_: 4 * basis)
    apart = hf.slq(matvec, VECTOR, probes=5, steps=20, seed=0)
    torch.testing.assert_close(apart.nodes, together.nodes)
    assert apart.passes == 60
    monkeypatch.setattr(density, "available_to", lambda *_: basis - 1)
    with pytest.raises(MemoryError, match="take fewer steps"):
        hf.slq(matvec, VECTOR, probes=5, steps=20, seed=0)


def test_budget_and_callback_leave_a_density() -> None:
    matvec = hf.dense(symmetric(SPECTRUM))
    short = hf.slq(matvec, VECTOR, probes=2, steps=50, max_matvecs=30, seed=0)
    assert short.nodes.shape == (2, 15)
    assert "budget" in short.reason
    stopped = hf.slq(matvec, VECTOR, probes=2, steps=50, seed=0, callback=lambda running: True)
    assert stopped.nodes.shape == (2, 10)
    torch.testing.assert_close(stopped.weights.sum(1), torch.ones(2).double())


@pytest.mark.parametrize("options", [{"probes": 0}, {"steps": 0}, {"max_matvecs": 0}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0: it must be at least 1"):
        hf.slq(hf.dense(symmetric(SPECTRUM)), VECTOR, **options)


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


def band(probes: int, n: int, level: float) -> float:
    """The half-width of the simultaneous band, without what encloses the quadrature."""
    found = of_nodes([[0.0, 1.0]] * probes, [[0.01, 0.99]] * probes, n, residual=0.1)
    upper = found.cdf_bounds(torch.tensor(-1.0), level, simultaneous=True)[1]
    return float(upper) - 0.01


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize(("n", "at_most"), [(3, 1.0), (10, 1.0), (50, 0.985), (1000, 0.965)])
def test_band_of_exact_quadratures_holds_at_all_eigenvalues_at_once(
    probes: int, n: int, at_most: float
) -> None:
    draws = 4000
    cumulated = shares(draws, probes, n).mean(1).cumsum(-1)
    away = (cumulated - torch.arange(1, n + 1) / n).abs().amax(-1)
    held = float((away <= band(probes, n, 0.95)).double().mean())
    # Three standard deviations of the simulation, 0.0034 each.
    assert 0.94 <= held <= at_most


def test_band_is_wider_than_pointwise_bounds_and_stays_a_probability() -> None:
    found = diagonal(SPECTRUM.double(), 4, 40, seed=0)
    points = torch.linspace(-2, 4, 50)
    lower, upper = found.cdf_bounds(points)
    low, high = found.cdf_bounds(points, simultaneous=True)
    inside = (lower > 0.05) & (upper < 0.95)
    assert inside.sum() > 20
    assert (low < lower)[inside].all()
    assert (high > upper)[inside].all()
    assert float(low.min()) == 0
    assert float(high.max()) == 1


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
    runs, held, widths = 60, 0, 0.0
    for seed in range(runs):
        found = diagonal(eigenvalues, probes=16, steps=70, seed=seed)
        lower, upper = found.cdf_bounds(points, simultaneous=True)
        held += int(((lower <= exact) & (exact <= upper)).all())
        widths += float((upper - lower).mean()) / runs
    assert held >= 0.95 * runs
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


SPECTRA: dict[str, Callable[[], torch.Tensor]] = {
    "flat": lambda: torch.linspace(1, 2, 300, dtype=torch.float64),
    "geometric": lambda: GEOMETRIC,
    "steep": lambda: GEOMETRIC**7,
    "one spike": lambda: torch.eye(300, dtype=torch.float64)[0],
    "spiked": spiked_spectrum,
}


@pytest.mark.parametrize("probes", [1, 4, 16])
@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_of_a_mean_hold_from_one_probe_on(name: str, probes: int) -> None:
    spectrum = SPECTRA[name]()
    truth, draws = float(spectrum.mean()), 600 if len(spectrum) < 2000 else 300
    held, squares = 0, 0.0
    for found in exact_densities(spectrum, probes, draws):
        estimate = found.mean(lambda x: x)
        low, high = estimate.interval()
        held += low <= truth <= high
        squares += estimate.stderr**2 / draws
    assert held >= 0.93 * draws
    variance = 2 / (len(spectrum) + 2) * float(spectrum.var(correction=0)) / probes
    assert squares == pytest.approx(variance, rel=0.15)


def test_intervals_of_slq_hold() -> None:
    truth, runs = float(GEOMETRIC.div(GEOMETRIC + 0.01).sum()), 150
    held = 0
    for seed in range(runs):
        low, high = diagonal(GEOMETRIC, 1, 40, seed).effective_dimension(0.01).interval()
        held += low <= truth <= high
    assert 0.91 * runs <= held


DECAY = torch.logspace(0, -8, 1000, dtype=torch.float64)
BRACKETED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, float]]] = {
    "log": (torch.log, {"smallest": 1e-8}),
    "resolvent": (lambda x: 1 / (x + 1e-4), {"smallest": 0.0}),
    "ratio": (lambda x: x / (x + 1e-6), {"smallest": 0.0}),
    "square root": (torch.sqrt, {"smallest": 0.0}),
    "exponential": (torch.exp, {}),
    "kink": (lambda x: (x - 0.1).clamp_min(0), {}),
    "step": (lambda x: (x > 1e-3).to(torch.float64), {}),
    "wave": (lambda x: torch.cos(5 * x), {}),
    "identity": (lambda x: x, {}),
}


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("name", BRACKETED)
def test_bounds_enclose_what_the_quadrature_misses(name: str, steps: int) -> None:
    f, ends = BRACKETED[name]
    probes = hf.random_like(DECAY, 2, kind="sphere", seed=4).square() / len(DECAY)
    right = float((probes @ f(DECAY)).mean())
    estimate = diagonal(DECAY, 2, steps, seed=4).mean(f, **ends)
    low, high = estimate.bounds or (math.nan, math.nan)
    assert low - 1e-12 <= right <= high + 1e-12
    assert low <= estimate.value <= high
    assert estimate.interval()[0] <= low - estimate.stderr
    assert high + estimate.stderr <= estimate.interval()[1]


def test_bounds_close_as_steps_resolve_the_function() -> None:
    for name in ("log", "ratio", "exponential", "identity"):
        f, ends = BRACKETED[name]
        flat = torch.linspace(1, 2, 300, dtype=torch.float64)
        estimate = diagonal(flat, 2, 20, seed=0).mean(f, **ends)
        low, high = estimate.bounds or (math.nan, math.nan)
        assert high - low <= 1e-9 * abs(estimate.value)


@pytest.mark.parametrize("steps", [5, 10, 40])
def test_intervals_of_few_steps_cover_an_effective_dimension(steps: int) -> None:
    right, held = float((DECAY / (DECAY + 1e-6)).sum()), 0
    for seed in range(10):
        low, high = diagonal(DECAY, 4, steps, seed).effective_dimension(1e-6).interval()
        held += low <= right <= high
        assert 0.0 <= high - low <= 1200
    assert held >= 9


def test_a_function_that_is_not_finite_within_the_spectrum_has_no_bounds() -> None:
    estimate = diagonal(DECAY, 2, 10, seed=0).mean(torch.log)
    assert estimate.interval()[0] == -math.inf
    assert "without bounds" in estimate.reason
    pole = diagonal(DECAY, 2, 5, seed=0).mean(lambda x: x / (x + 1e-3))
    low, high = pole.interval()
    assert low <= float((DECAY / (DECAY + 1e-3)).mean()) <= high


def test_ends_that_eigenvalues_pass_are_refused() -> None:
    found = diagonal(SPECTRUM.double(), 2, 30, seed=0)
    with pytest.raises(ValueError, match=r"smallest=0.0: a Ritz value lies at -0.9"):
        found.mean(torch.exp, smallest=0.0)
    with pytest.raises(ValueError, match="largest=1: a Ritz value lies at 2.9"):
        found.mean(torch.exp, largest=1)


def test_the_rounding_of_products_is_part_of_the_interval() -> None:
    # Zeros of a matrix in float32 come out as 1e-7 |A|, which is far above the damping.
    factor = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    matvec = hf.batched(lambda v: factor.mT @ (factor @ v))
    found = hf.slq(matvec, torch.zeros(300), probes=4, steps=60, seed=0)
    low, high = found.effective_dimension(1e-6).interval()
    assert low <= 40 <= high


def test_pooled_means_keep_their_bounds() -> None:
    f, ends = BRACKETED["ratio"]
    estimates = [diagonal(DECAY, 1, 5, seed).mean(f, **ends) for seed in range(2)]
    pooled = hf.pool(estimates)
    both = [estimate.bounds or (0.0, 0.0) for estimate in estimates]
    assert pooled.bounds == pytest.approx([sum(b[i] for b in both) / 2 for i in (0, 1)])
    assert pooled.interval()[0] < float(f(DECAY).mean()) < pooled.interval()[1]


def test_unknown_residuals_leave_bounds_unknown() -> None:
    found = Density(**{**vars(of_nodes([[1.0, 2.0]], [[0.5, 0.5]], 10)), "residuals": None})
    assert found.mean(torch.exp).interval() == (-math.inf, math.inf)
    low, high = found.mean(torch.exp, smallest=1.0, largest=2.0).bounds or (0.0, 0.0)
    assert math.exp(1) <= low < high <= math.exp(2)


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


@pytest.mark.parametrize(
    "matvec",
    [
        lambda v: v @ torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).double(),
        lambda v: v * torch.linspace(1, 2, 30) + 0.02 * v.roll(1, 1),
        lambda v: 2 * v + torch.randn(v.shape, dtype=v.dtype),
    ],
    ids=["random", "a cycle of 1 %", "noise"],
)
def test_asymmetric_matvec_is_refused(matvec: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="not symmetric or not deterministic"):
        hf.slq(matvec, torch.zeros(30, dtype=torch.float64), steps=20, seed=0)


def test_mean_tells_where_it_comes_from() -> None:
    found = of_nodes([[1.0, 3.0], [1.0, 3.0]], [[0.5, 0.5], [0.25, 0.75]], 10).mean(lambda x: x)
    assert found.value == pytest.approx(2.25)
    assert found.samples.tolist() == [2.0, 2.5]
    # The mean square of -1.25 and 0.75 with weights 3/8 and 5/8.
    assert found.stderr == pytest.approx(math.sqrt(2 * 0.9375 / (2 * 12 - 2)))
    assert found.degrees == int(20 * 0.9375**2 / (0.375 * 1.25**4 + 0.625 * 0.75**4))
    assert (found.matvecs, found.passes, found.seed, found.by_leaf) == (7, 5, 3, {})
    assert found.reason == "mean of f over the spectrum"


def test_mean_of_a_constant_has_no_error() -> None:
    found = diagonal(torch.full((50,), 3.0, dtype=torch.float64), 2, 5, seed=0)
    estimate = found.mean(torch.ones_like)
    assert (estimate.value, estimate.stderr) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert estimate.interval() == (pytest.approx(1), pytest.approx(1))


def test_nodes_of_no_weight_do_not_count() -> None:
    found = of_nodes([[0.0, 1.0, 2.0]], [[0.0, 0.5, 0.5]], 10)
    assert found.mean(lambda x: 1 / x).value == pytest.approx(0.75)
    assert found.mean(torch.log).value == pytest.approx(0.5 * math.log(2))


def test_mean_refuses_the_log_of_a_negative_node() -> None:
    found = of_nodes([[-9.0, -0.25, 1.0], [-0.5, 2.0, 3.0]], [[0, 0.5, 0.5], [0.2, 0.4, 0.4]], 10)
    with pytest.raises(ValueError, match=r"at 2 nodes, the smallest -0.5: shift the matrix, or"):
        found.mean(torch.log)


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


def test_probes_that_the_budget_cuts_short_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = symmetric(torch.linspace(-1, 1, 60))
    like = torch.zeros(60).double()
    monkeypatch.setattr(density, "available_to", lambda *_: 2 * 2 * 20 * 60 * 8)
    found = hf.slq(hf.dense(matrix), like, probes=5, steps=20, max_matvecs=50, seed=0)
    assert found.nodes.shape == (2, 20)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2).double())


def test_bounds_take_a_number_and_refuse_nan() -> None:
    matrix = symmetric(torch.linspace(-1, 1, 60))
    found = hf.slq(hf.dense(matrix), torch.zeros(60).double(), seed=0)
    low, high = found.cdf_bounds(0.0)
    assert float(low) <= 0.5 <= float(high)
    with pytest.raises(ValueError, match="NaN"):
        found.count_above(float("nan"))


def test_bases_from_afar_give_the_same_density(tmp_path: Path) -> None:
    # One of the probes ends early.
    spectrum = torch.cat([torch.linspace(-1, 1, 100), torch.zeros(20)]).double()
    cut = torch.arange(120) < 60

    def matvec(block: torch.Tensor) -> torch.Tensor:
        images = block * spectrum * cut
        # The second probe meets a matrix of zeros, and ends before its second product.
        if len(block) == 3:
            images[1] = 0
        return images

    like, options = torch.zeros(120).double(), {"probes": 3, "steps": 40, "seed": 0}
    expected = hf.slq(matvec, like, **options)
    with every_basis_is_far(5 * 120 * 8), counted_copies() as copies:
        found = hf.slq(matvec, like, **options)
    rows = sum(2 * m for m in range(1, 41))
    # Twice for each step of the two probes, with a block a step, there and back.
    assert sum(copies) <= (2 * rows + 2 * 3 * 41) * 120 * 8
    torch.testing.assert_close(found.nodes, expected.nodes, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=1e-10)
    assert (found.reason, found.matvecs) == (expected.reason, expected.matvecs)
    with every_basis_is_far(5 * 120 * 8):
        with copies_are_late():
            late = hf.slq(matvec, like, **options)
            hf.slq(matvec, like, checkpoint=tmp_path, callback=lambda running: True, **options)
        again = hf.slq(matvec, like, checkpoint=tmp_path, **options)
    assert torch.equal(late.nodes, found.nodes)
    assert torch.equal(again.nodes, found.nodes)


def test_probes_whose_bases_are_afar_must_fit_beside_two_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matvec, vector = hf.dense(symmetric(SPECTRUM)), 200 * 8
    together = hf.slq(matvec, VECTOR, probes=5, steps=20, seed=0)
    with every_basis_is_far(piece=vector):
        monkeypatch.setattr(streamed, "available_to", lambda _: 2 * (2 + 2) * vector)
        apart = hf.slq(matvec, VECTOR, probes=5, steps=20, seed=0)
        monkeypatch.setattr(streamed, "available_to", lambda _: 2 * 2 * vector)
        with pytest.raises(MemoryError, match="two pieces of a basis that is kept elsewhere"):
            hf.slq(matvec, VECTOR, probes=5, steps=20, seed=0)
    torch.testing.assert_close(apart.nodes, together.nodes)
    assert apart.passes == 60


@pytest.mark.gpu
def test_the_bases_of_a_gpu_in_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    n, steps, probes = 2**19, 60, 2
    monkeypatch.setattr(streamed, "_PIECE", 2**24)
    spectrum = torch.linspace(-1, 3, n, dtype=torch.float64, device="cuda")
    found, peaks = [], []
    for device in (None, "cpu"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(
            hf.slq(
                lambda block: block * spectrum,
                torch.zeros_like(spectrum),
                probes=probes,
                steps=steps,
                basis_device=device,
                seed=0,
            )
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    on_gpu, on_host = found
    torch.testing.assert_close(on_host.nodes, on_gpu.nodes, rtol=0, atol=1e-10)
    torch.testing.assert_close(on_host.weights, on_gpu.weights, rtol=0, atol=1e-10)
    assert peaks[0] - peaks[1] > 0.8 * (steps * probes * n * 8 - 2 * 2**24)
