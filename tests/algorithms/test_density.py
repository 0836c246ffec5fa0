from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms import density
from tests.algorithms.spectra import spiked, symmetric

SPECTRUM = torch.linspace(-1, 3, 200)
VECTOR = torch.zeros(200, dtype=torch.float64)


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
    monkeypatch.setattr(density, "available_memory", lambda device: 4 * basis)
    apart = hf.slq(matvec, VECTOR, probes=5, steps=20, seed=0)
    torch.testing.assert_close(apart.nodes, together.nodes)
    assert apart.passes == 60
    monkeypatch.setattr(density, "available_memory", lambda device: basis - 1)
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


def test_count_of_outliers_is_bracketed() -> None:
    matvec, like = hf.dense(spiked()), torch.zeros(2000).double()
    for seed in range(5):
        found = hf.slq(matvec, like, probes=4, steps=80, seed=seed)
        low, high = found.count_above(4.1)
        # Converged Ritz values alone give the lower bound.
        assert low == 3
        assert 3 <= high <= 23
        assert found.count_above(-1.0)[1] == 2000
        assert found.count_above(10.0)[0] == 0


def test_bounds_refuse_a_percentage() -> None:
    found = hf.slq(hf.dense(symmetric(SPECTRUM)), VECTOR, steps=5, seed=0)
    with pytest.raises(ValueError, match="level=95"):
        found.cdf_bounds(torch.zeros(1), 95)
