"""Power iteration on random batches, with momentum and variance reduction."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.eigen.stochastic_power import stochastic_power_iteration
from hessfunc.transforms.batches.draws import draws
from tests.cases import case, dense_hessian
from tests.reference.spectra import symmetric

N = 60
LIKE = torch.zeros(N, dtype=torch.float64)
MEAN = symmetric(torch.cat([torch.linspace(0, 1, N - 2), torch.tensor([1.5, 2.0])]))


def batches_around(mean: Tensor, noise: float, count: int = 20) -> Tensor:
    """Symmetric matrices ``(count, n, n)`` with exactly this mean, each off by about ``noise``."""
    generator = torch.Generator().manual_seed(0)
    off = torch.randn(count, *mean.shape, dtype=torch.float64, generator=generator)
    off = (off + off.mT) * (noise / (2 * len(mean)) ** 0.5 / 2)
    return mean + off - off.mean(0)


def drawn_from(matrices: Tensor, seed: int = 0) -> Callable[[int], hf.trees.Matvec]:
    """The matvec of a random one of the matrices."""
    return draws(lambda params, place: hf.dense(matrices[place]), weight=lambda _: 1, seed=seed)(
        LIKE, range(len(matrices))
    )


NOISY = batches_around(MEAN, 0.3)


def run(matrices: Tensor = NOISY, **options: Any) -> hf.results.Eigenpairs:
    """The top pair of the mean of matrices, from one random matrix at a time."""
    exact = hf.dense(matrices.mean(0))
    options = {"seed": 0, "max_matvecs": 2000, **options}
    return stochastic_power_iteration(exact, drawn_from(matrices), LIKE, **options)


def with_one_batch(found: hf.results.Eigenpairs) -> int:
    """How many products were with one batch, as the reason says."""
    match = re.search(r"; (\d+) of the (\d+) products were with one batch", found.reason)
    assert match is not None
    assert int(match[2]) == found.matvecs
    return int(match[1])


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_converges_to_the_pair_of_the_mean_to_any_precision(momentum: float) -> None:
    found = run(rtol=1e-9, momentum=momentum)
    assert found.converged.all()
    assert found.reason.startswith("converged")
    assert float(found.values) == pytest.approx(2.0, rel=1e-12)
    top = torch.linalg.eigh(MEAN).eigenvectors[:, -1]
    assert abs(float(found.vectors[0] @ top)) == pytest.approx(1, abs=1e-12)
    assert float(torch.minimum((found.vectors - top).norm(), (found.vectors + top).norm())) < 1e-6


def test_without_variance_reduction_the_same_draws_stall() -> None:
    random = drawn_from(NOISY)
    w = torch.linalg.eigh(MEAN).eigenvectors[:, -1:].mT.contiguous()
    residuals = []
    for i in range(1000):
        w = random(i)(w)
        w = w / w.norm()
        image = w @ MEAN
        residuals.append(float((image - (image @ w.mT) * w).norm()))
    # It starts at the eigenvector itself, and is thrown off by every batch.
    assert min(residuals[10:]) > 1e-2
    assert float(run(rtol=1e-6).residuals) < 2e-6


def test_residual_is_that_of_the_exact_matrix() -> None:
    found = run(rtol=1e-3)
    image = found.vectors @ MEAN
    residual = (image - found.values[:, None] * found.vectors).norm(dim=1)
    torch.testing.assert_close(found.residuals, residual, rtol=1e-8, atol=1e-14)
    assert float(residual) <= 1e-3 * float(found.values)
    assert found.vectors.norm() == pytest.approx(1, rel=1e-12)


def test_a_tighter_tolerance_takes_more_products() -> None:
    products = [run(rtol=rtol).matvecs for rtol in (1e-2, 1e-4, 1e-8)]
    assert products == sorted(set(products))


def test_fewer_exact_products_than_power_iteration() -> None:
    slow = symmetric(torch.cat([torch.linspace(0, 1, N - 1), torch.tensor([1.05])]))
    matrices = batches_around(slow, 0.02)
    exact = hf.power_iteration(hf.dense(slow), LIKE, rtol=1e-4, seed=0)
    found = run(matrices, rtol=1e-4)
    assert exact.converged.all()
    assert found.converged.all()
    assert found.matvecs - with_one_batch(found) < exact.matvecs / 4


def test_momentum_takes_fewer_products_where_there_is_little_noise() -> None:
    slow = symmetric(torch.cat([torch.linspace(0, 1, N - 1), torch.tensor([1.05])]))
    matrices = batches_around(slow, 0.01)
    plain, fast = (run(matrices, rtol=1e-4, momentum=b) for b in (0.0, 0.2))
    assert fast.converged.all()
    assert fast.matvecs < plain.matvecs / 1.5
    assert float(fast.values) == pytest.approx(1.05, rel=1e-5)


def test_without_noise_it_is_power_iteration() -> None:
    alike = MEAN.expand(3, N, N)
    exact = hf.power_iteration(hf.dense(MEAN), LIKE, momentum=0.1, rtol=0.0, max_matvecs=23, seed=4)
    found = run(alike, momentum=0.1, rtol=0.0, max_matvecs=23, steps_per_epoch=0, seed=4)
    torch.testing.assert_close(found.vectors, exact.vectors, rtol=1e-10, atol=1e-12)
    # Each epoch's first step has no product of its own.
    longer = run(alike, momentum=0.1, rtol=0.0, max_matvecs=21, steps_per_epoch=1, seed=4)
    assert (longer.matvecs, with_one_batch(longer)) == (21, 10)
    ahead = hf.power_iteration(hf.dense(MEAN), LIKE, momentum=0.1, rtol=0.0, max_matvecs=21, seed=4)
    torch.testing.assert_close(longer.vectors, ahead.vectors, rtol=1e-10, atol=1e-12)


def test_negative_and_zero_eigenvalues() -> None:
    found = run(-NOISY, rtol=1e-8, momentum=0.3)
    assert float(found.values) == pytest.approx(-2.0, rel=1e-10)
    assert found.converged.all()
    nothing = run(torch.zeros(3, N, N, dtype=torch.float64))
    assert nothing.values.tolist() == [0.0]
    assert nothing.converged.all()


def test_budget_is_kept_and_both_kinds_are_counted() -> None:
    found = run(rtol=0.0, max_matvecs=38, steps_per_epoch=10)
    # One exact product first, then epochs of ten and one: 1 + 11 + 11 + 11 + 4.
    assert (found.matvecs, found.passes, with_one_batch(found)) == (38, 38, 33)
    assert not found.converged.any()
    assert "budget exhausted after 38 matvecs" in found.reason


def test_noise_beyond_all_measure_leaves_exact_steps() -> None:
    found = run(batches_around(MEAN, 5.0), rtol=1e-6)
    exact = hf.power_iteration(hf.dense(MEAN), LIKE, rtol=1e-6, seed=0)
    assert found.converged.all()
    assert float(found.values) == pytest.approx(2.0, rel=1e-9)
    # Epochs that are taken back cost an exact product each.
    assert found.matvecs - with_one_batch(found) < 4 * exact.matvecs


def test_budget_that_ends_before_is_told() -> None:
    found = run(rtol=1e-6, max_matvecs=15)
    assert not found.converged.any()
    low, high = found.intervals[0]
    values = torch.linalg.eigvalsh(MEAN)
    assert ((low <= values) & (values <= high)).any()


def test_start_callback_and_seed() -> None:
    top = torch.linalg.eigh(MEAN).eigenvectors[:, -1].contiguous()
    found = run(start=top)
    assert (found.matvecs, with_one_batch(found)) == (1, 0)
    stopped = run(rtol=0.0, callback=lambda running: running.matvecs >= 12)
    assert stopped.matvecs == 12
    assert "callback" in stopped.reason
    first = run(seed=None, rtol=1e-4)
    again = run(seed=first.seed, rtol=1e-4)
    assert torch.equal(first.vectors, again.vectors)


def test_a_real_net_against_its_dense_hessian() -> None:
    found = case("conv")
    batches = hf.microbatches(found.batch, 2)
    random = draws(hf.hvp(found.loss), seed=0)(found.params, batches)
    pair = stochastic_power_iteration(
        random.full, random, found.params, steps_per_epoch=3, rtol=1e-5, seed=0
    )
    values = torch.linalg.eigvalsh(dense_hessian("conv"))
    assert pair.converged.all()
    assert float(pair.values) == pytest.approx(float(values[values.abs().argmax()]), rel=1e-8)
    assert with_one_batch(pair) > pair.matvecs / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol"),
        ({"momentum": -1.0}, "momentum"),
        ({"steps_per_epoch": -1}, "steps_per_epoch=-1: it must be at least 0"),
        ({"max_matvecs": 0}, "max_matvecs=0"),
        ({"start": LIKE}, "zeros"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_product_of_a_batch_that_is_not_finite_is_named() -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        stochastic_power_iteration(
            hf.dense(MEAN), lambda i: lambda v: v * float("nan"), LIKE, seed=0
        )
