from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms import density
from hessfunc.algorithms import offload as streamed
from tests.algorithms.densities import GEOMETRIC, SPECTRUM, VECTOR, diagonal
from tests.algorithms.far import copies_are_late, counted_copies, every_basis_is_far
from tests.reference.spectra import spiked, symmetric


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


def test_intervals_of_slq_hold() -> None:
    truth, runs = float(GEOMETRIC.div(GEOMETRIC + 0.01).sum()), 80
    held = 0
    for seed in range(runs):
        low, high = diagonal(GEOMETRIC, 1, 40, seed).effective_dimension(0.01).interval()
        held += low <= truth <= high
    assert 0.9 * runs <= held


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
    with pytest.raises(ValueError, match="not symmetric, not linear or not deterministic"):
        hf.slq(matvec, torch.zeros(30, dtype=torch.float64), steps=20, seed=0)


def test_probes_that_the_budget_cuts_short_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = symmetric(torch.linspace(-1, 1, 60))
    like = torch.zeros(60).double()
    monkeypatch.setattr(density, "available_to", lambda *_: 2 * 2 * 20 * 60 * 8)
    found = hf.slq(hf.dense(matrix), like, probes=5, steps=20, max_matvecs=50, seed=0)
    assert found.nodes.shape == (2, 20)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2).double())


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
