"""The face of hessian-eigenthings 0.x against dense Hessians, and its 1.0 beside the core."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import cifar10
from hessfunc.app.problems.resnet import load_weights, resnet
from hessfunc.compat.eigenthings import (
    HVPOperator,
    compute_hessian_eigenthings,
    deflated_power_iteration,
    lanczos,
)
from tests.compat.eigenthings.problem import data, dense, loader, matrix, net, operator
from tests.datapath import data_file


@pytest.mark.parametrize("mode", ["power_iter", "lanczos"])
def test_a_model_in_bfloat16_gives_arrays_in_float32(mode: Any) -> None:
    exact = float(torch.linalg.eigvalsh(dense(net(), data()))[-1])
    values, vectors = compute_hessian_eigenthings(
        net(torch.bfloat16),
        loader(20, torch.bfloat16),
        cross_entropy,
        1,
        mode=mode,
        **{"power_iter": {"power_iter_err_threshold": 0.1}, "lanczos": {"tol": 0.05}}[mode],
    )
    assert vectors.dtype == np.float32
    assert values[0] == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("mode", ["power_iter", "lanczos"])
def test_eigenthings_are_those_of_the_dense_hessian(mode: Any) -> None:
    model = net()
    exact, basis = torch.linalg.eigh(dense(model, data()))
    options = {
        "power_iter": {"power_iter_steps": 400, "power_iter_err_threshold": 1e-6},
        "lanczos": {},
    }
    values, vectors = compute_hessian_eigenthings(
        model, loader(20), cross_entropy, 3, mode=mode, **options[mode]
    )
    largest = exact[exact.abs().argsort(descending=True)[:3]].sort().values.numpy()
    found = values[::-1] if mode == "power_iter" else values
    np.testing.assert_allclose(found, largest, rtol=1e-5)
    assert vectors.dtype == np.float64
    top = vectors[0 if mode == "power_iter" else -1]
    assert abs(top @ basis[:, -1].numpy()) == pytest.approx(1, abs=1e-6)


def test_random_batches_give_the_pair_of_all() -> None:
    model = net()
    exact = torch.linalg.eigvalsh(dense(model, data()))
    for momentum in (0.0, (float(exact[-2]) / 2) ** 2 / 4):
        values, vectors = compute_hessian_eigenthings(
            model,
            loader(10),
            cross_entropy,
            2,
            full_dataset=False,
            power_iter_steps=600,
            power_iter_err_threshold=1e-2,
            momentum=momentum,
        )
        assert vectors.shape == (2, 43)
        np.testing.assert_allclose(values, exact[[-1, -2]].numpy(), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_most_products_on_random_batches_are_with_one() -> None:
    read: dict[bool, int] = {}
    for full in (True, False):

        def counted(logits: Tensor, targets: Tensor, full: bool = full) -> Tensor:
            read[full] = read.get(full, 0) + len(logits)
            return cross_entropy(logits, targets)

        compute_hessian_eigenthings(
            net(),
            loader(5),
            counted,
            1,
            full_dataset=full,
            power_iter_steps=22,
            power_iter_err_threshold=0.0,
        )
    assert read[False] < read[True] / 3


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="choose 'power_iter' or 'lanczos'"):
        compute_hessian_eigenthings(net(), loader(20), cross_entropy, mode="arnoldi")  # type: ignore[arg-type]
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"={count}: .* 8 eigenvalues, choose 1 to 8"):
            deflated_power_iteration(operator(), count)
        with pytest.raises(ValueError, match=f"={count}: .* 8 eigenvalues, choose 1 to 8"):
            lanczos(operator(), count)
    empty = HVPOperator(net(), [], cross_entropy, full_dataset=False)
    with pytest.raises(ValueError, match="the dataloader has no batch"):
        empty.apply(torch.ones(43, dtype=torch.float64))


def real() -> Any:
    return pytest.importorskip(
        "hessian_eigenthings", reason="compares with hessian-eigenthings 1.0, of the extra peers"
    )


def agrees(model: nn.Module, batches: list[tuple[Tensor, Tensor]], k: int, steps: int) -> None:
    """The real package, the face and the core on one Hessian, each to its own accuracy.

    Eigenvalues to the sum of both residuals; traces to 4 standard errors of their difference;
    the first two moments of the densities, those of the quadrature, to 4 of theirs.
    """
    peer = real()
    theirs = peer.HessianOperator(model, batches, peer.supervised_loss(cross_entropy))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, cross_entropy)
    matvec = hf.over_batches(hf.hvp(loss))(params, batches)

    expected = peer.lanczos(theirs, k=k, max_iter=steps, seed=0)
    assert expected.converged.all()
    found = hf.lanczos(matvec, params, k=k, rtol=1e-3, seed=0)
    assert found.converged.all()
    rounding = 1e-4 * found.largest
    error = (found.values - expected.eigenvalues.double()).abs()
    assert bool((error <= found.residuals + expected.residuals + rounding).all())
    values, vectors = compute_hessian_eigenthings(
        model, batches, cross_entropy, k, mode="lanczos", tol=1e-3
    )
    np.testing.assert_allclose(values, found.values.sort().values, rtol=0, atol=2e-3 * values[-1])
    overlap = float(
        torch.from_numpy(vectors[-1]).to(expected.eigenvectors) @ expected.eigenvectors[0]
    )
    assert abs(overlap) == pytest.approx(1, abs=1e-3)

    trace = peer.trace(theirs, num_matvecs=steps, method="hutchinson", seed=0)
    ours = hf.xtrace(matvec, params, max_matvecs=steps, seed=0)
    assert abs(trace.estimate - ours.value) <= 4 * np.hypot(trace.stderr, ours.stderr)

    density = peer.spectral_density(theirs, num_runs=2, lanczos_steps=steps // 3, seed=0)
    esd = hf.slq(matvec, params, probes=2, steps=steps // 3, seed=0)
    mean = (density.raw_weights * density.raw_eigenvalues).sum(1)
    mine = esd.mean(lambda x: x)
    both = np.hypot(float(mean.std()) / np.sqrt(2), mine.stderr)
    assert abs(float(mean.mean()) - mine.value) <= 4 * both
    assert float(density.raw_eigenvalues.max()) == pytest.approx(float(found.values[0]), rel=1e-3)
    low, high = esd.count_above(float(found.values[0]) * 0.999)
    assert low == 1 <= high


def test_the_real_package_agrees_on_a_small_net() -> None:
    inputs, targets = data()
    batches = [(inputs[i : i + 25], targets[i : i + 25]) for i in (0, 25)]
    agrees(net(), batches, k=4, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_package_agrees_on_resnet20() -> None:
    images = cifar10(data_file("cifar10"))
    model = resnet(20)
    model.load_state_dict(load_weights(data_file("resnet20_cifar10/resnet20-12fca82f.th")))
    batches = [(images.inputs[i : i + 2], images.targets[i : i + 2]) for i in (0, 2)]
    agrees(model.eval(), batches, k=3, steps=24)


def test_the_momentum_of_the_real_package_still_moves_the_value() -> None:
    """Why its momentum is none to compare with: 1.0 has what the face corrects."""
    peer = real()
    found = peer.power_iteration_one(
        peer.LambdaOperator(lambda v: matrix().float() @ v, 8),
        max_iter=300,
        tol=1e-6,
        momentum=0.5,
        seed=0,
    )
    assert found[0] == pytest.approx(4.5, rel=1e-4)


def test_arguments_of_other_versions_are_translated_or_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match="fp16=64: fp16 must be True or False.*gpu_samples=64"):
        compute_hessian_eigenthings(
            model, loader(20), cross_entropy, 2, True, "power_iter", False, 64
        )
    with pytest.raises(TypeError, match="full_dataset must be True or False"):
        compute_hessian_eigenthings(model, loader(20), cross_entropy, 2, 20)
    old, new = (
        compute_hessian_eigenthings(model, loader(20), cross_entropy, 2, mode="lanczos", **option)
        for option in ({"max_samples": 7}, {"max_possible_gpu_samples": 7})
    )
    np.testing.assert_allclose(old[0], new[0], rtol=1e-6)
