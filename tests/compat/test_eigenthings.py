"""The face of hessian-eigenthings 0.x against dense Hessians, and its 1.0 beside the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc.app.problems.data import cifar10
from hessfunc.app.problems.resnet import load_weights, resnet
from hessfunc.compat.eigenthings import (
    HVPOperator,
    LambdaOperator,
    Operator,
    compute_hessian_eigenthings,
    deflated_power_iteration,
    lanczos,
    power_iteration,
)
from tests.datapath import data_file
from tests.graphs import counted_graphs
from tests.reference import hessian

SPECTRUM = torch.tensor([5.0, -4.0, 3.0, 2.0, -1.0, 0.5, 0.2, 0.1])


def matrix() -> Tensor:
    """A symmetric float32 matrix of that spectrum."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator)).Q
    return (basis * SPECTRUM.double()) @ basis.mT


def operator(of: Tensor | None = None) -> LambdaOperator:
    found = (matrix() if of is None else of).float()
    return LambdaOperator(lambda vector: found @ vector, 8)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model.to(dtype).eval()


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 4, generator=generator).to(dtype)
    return inputs, torch.randint(3, (50,), generator=generator)


def loader(size: int, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """50 examples: 3 batches of 20, 20 and 10, where size is 20."""
    return DataLoader(TensorDataset(*data(dtype)), batch_size=size)


def dense(model: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    model_fn, params = hf.functional(model)
    return hessian(hf.supervised(model_fn, cross_entropy), params, examples)


def test_power_iteration_descends_and_lanczos_ascends() -> None:
    for mode, expected, options in [
        ("power_iter", [5, 3, 2, -4], {"power_iter_steps": 300, "power_iter_err_threshold": 1e-5}),
        ("lanczos", [-4, 2, 3, 5], {}),
    ]:
        algorithm: Callable[..., Any] = {
            "power_iter": deflated_power_iteration,
            "lanczos": lanczos,
        }[mode]
        values, vectors = algorithm(operator(), 4, **options)
        assert isinstance(values, np.ndarray)
        assert vectors.shape == (4, 8)
        np.testing.assert_allclose(values, expected, rtol=1e-4)
        images = vectors @ matrix().numpy()
        np.testing.assert_allclose(images, values[:, None] * vectors, atol=1e-3)
        # Neither is a view that torch refuses.
        assert torch.from_numpy(vectors).dtype == torch.float32


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_lanczos_takes_either_end(which: str) -> None:
    values, _ = lanczos(operator(), 2, which=which)
    np.testing.assert_allclose(
        values, {"LA": [3, 5], "SA": [-4, -1], "BE": [-4, 5]}[which], rtol=1e-5
    )


def test_an_operator_may_be_a_class_of_its_own_with_a_shape() -> None:
    class Doubling(Operator):
        def apply(self, vec: Tensor) -> Tensor:
            return 2 * vec

    value, vector = power_iteration(Doubling((8, 8)))
    assert value == pytest.approx(2.0)
    assert vector.shape == (8,)
    with pytest.raises(NotImplementedError):
        Operator(3).apply(torch.zeros(3))


def test_vectors_may_stay_tensors() -> None:
    values, vectors = deflated_power_iteration(operator(), 2, power_iter_steps=300, to_numpy=False)
    assert isinstance(values, Tensor)
    assert isinstance(vectors, Tensor)


@pytest.mark.parametrize("momentum", [0.5, 3.0])
def test_momentum_does_not_move_the_value(momentum: float) -> None:
    value, vector = power_iteration(operator(), 300, 1e-6, momentum)
    assert value == pytest.approx(5.0, rel=1e-5)
    residual = matrix().float() @ vector - value * vector
    assert float(residual.norm()) <= 1e-5 * 5


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_momentum_saves_products() -> None:
    close = torch.diag(torch.tensor([1.0, 0.99, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01]))
    start = torch.ones(8)
    plain, fast = (
        power_iteration(operator(close), 100, 1e-6, momentum, init_vec=start)[0]
        for momentum in (0.0, 0.99**2 / 4)
    )
    assert abs(fast - 1) < abs(plain - 1) / 10


def test_runs_start_from_init_vec() -> None:
    start = torch.arange(1.0, 9.0)
    for run in (
        lambda op: power_iteration(op, 100, init_vec=start),
        lambda op: lanczos(op, 2, init_vec=start.numpy()),
    ):
        seen: list[Tensor] = []

        def noted(vector: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(vector.clone())
            return matrix().float() @ vector

        run(LambdaOperator(noted, 8))
        torch.testing.assert_close(seen[0], start / start.norm())


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_no_start_lies_where_deflation_has_put_a_zero() -> None:
    starts: list[Tensor] = []
    products = 0

    def noted(vector: Tensor) -> Tensor:
        nonlocal products
        if products % 30 == 0:
            starts.append(vector.clone())
        products += 1
        return matrix().float() @ vector

    _, vectors = deflated_power_iteration(
        LambdaOperator(noted, 8), 3, power_iter_steps=30, power_iter_err_threshold=0
    )
    assert products == 90
    overlaps = torch.stack(starts)[1:] @ torch.from_numpy(vectors).mT
    assert float(overlaps.abs().max()) < 0.95


def test_the_threshold_is_one_of_the_residual() -> None:
    for threshold in (1e-1, 1e-3, 1e-5):
        value, vector = power_iteration(operator(), 1000, threshold)
        residual = matrix().float() @ vector - value * vector
        assert float(residual.norm()) <= 1.01 * threshold * abs(value) + 1e-6


def test_pairs_that_have_not_converged_are_warned_of() -> None:
    wide = torch.diag(torch.linspace(1.0, 2.0, 300))
    slow = LambdaOperator(lambda vector: wide @ vector, 300)
    with pytest.warns(UserWarning, match="of 3 pairs have not converged.*increase `max_steps`"):
        values, _ = lanczos(slow, 3, max_steps=1, num_lanczos_vectors=8)
    assert len(values) == 3
    with pytest.raises(ValueError, match="choose 'LM'"):
        lanczos(slow, 3, which="SM")
    with pytest.warns(UserWarning, match="3 of 3 .*increase `power_iter_steps`") as told:
        values, vectors = deflated_power_iteration(slow, 3)
    assert len(told) == 1
    residuals = np.linalg.norm(vectors @ wide.numpy() - values[:, None] * vectors, axis=1)
    said = float(str(told[0].message).split("up to ")[1].split(":")[0])
    assert said == pytest.approx(residuals.max(), rel=0.1)
    with pytest.warns(UserWarning, match="1 of 1 pairs have not converged.*increase `steps`"):
        power_iteration(slow)
    # Two of three are found.
    well_apart = LambdaOperator(lambda vector: apart * vector, 4)
    apart = torch.tensor([9.0, 3.0, 1.0, 0.99])
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        deflated_power_iteration(well_apart, 3, power_iter_steps=30)


def test_without_a_number_of_restarts_there_are_as_many_as_it_takes() -> None:
    close = 1 + torch.arange(400) / 1e5
    slow = LambdaOperator(lambda vector: close * vector, 400)
    with pytest.warns(UserWarning, match="not converged"):
        lanczos(slow, 2, num_lanczos_vectors=6, max_steps=3)
    values, _ = lanczos(slow, 2, num_lanczos_vectors=6, max_steps=None)
    np.testing.assert_allclose(values, close[-2:].numpy(), rtol=1e-5)


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


def test_float16_is_that_of_the_vectors() -> None:
    seen: set[torch.dtype] = set()

    def noted(vector: Tensor) -> Tensor:
        seen.add(vector.dtype)
        return (matrix().float() @ vector.float()).half()

    values, vectors = deflated_power_iteration(
        LambdaOperator(noted, 8), 2, power_iter_steps=60, fp16=True
    )
    assert seen == {torch.float16}
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.abs(values), [5, 4], rtol=1e-2)
    model = net(torch.float32)
    product = HVPOperator(model, loader(20, torch.float32), cross_entropy, fp16=True)
    assert product.apply(torch.ones(product.size).half()).dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_the_seed_is_that_of_torch() -> None:
    def run() -> Any:
        return deflated_power_iteration(operator(), 2, power_iter_steps=3)[0]

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    np.testing.assert_array_equal(run(), first)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("size", [50, 20])
@pytest.mark.parametrize("pieces", [2**16, 7])
def test_products_are_those_of_all_examples_however_they_are_cut(size: int, pieces: int) -> None:
    model = net()
    found = HVPOperator(
        model, loader(size), cross_entropy, use_gpu=False, max_possible_gpu_samples=pieces
    )
    expected = dense(model, data())
    assert found.size == len(expected)
    for vector in torch.eye(found.size, dtype=torch.float64)[::9]:
        torch.testing.assert_close(found.apply(vector), expected @ vector)


def test_a_piece_is_as_small_as_asked_and_its_graph_lives_alone() -> None:
    sizes: list[int] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(logits))
        return cross_entropy(logits, targets)

    def most_of(examples: int) -> int:
        batch = tuple(part[:examples] for part in data())
        found = HVPOperator(net(), [batch], criterion, max_possible_gpu_samples=13)
        with counted_graphs() as graphs:
            found.apply(torch.ones(found.size, dtype=torch.float64))
        return graphs.most

    alone, four = most_of(13), most_of(50)
    assert 0 < four <= alone
    assert max(sizes) == 13


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
            power_iter_err_threshold=1e-3,
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


def test_batches_may_be_shuffled() -> None:
    model = net()
    shuffled = DataLoader(TensorDataset(*data()), batch_size=20, shuffle=True)
    found = HVPOperator(model, shuffled, cross_entropy)
    vector = torch.ones(found.size, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(found.apply(vector), dense(model, data()) @ vector)
    values, _ = compute_hessian_eigenthings(model, shuffled, cross_entropy, 2, mode="lanczos")
    assert values[-1] == pytest.approx(float(torch.linalg.eigvalsh(dense(model, data()))[-1]))


def test_a_product_with_one_batch_takes_the_next() -> None:
    model, (inputs, targets) = net(), data()
    found = HVPOperator(model, loader(20), cross_entropy, full_dataset=False)
    vector = torch.ones(found.size, dtype=torch.float64)
    for start in (0, 20, 40, 0):
        part = slice(start, start + 20)
        expected = dense(model, (inputs[part], targets[part])) @ vector
        torch.testing.assert_close(found.apply(vector), expected)


def test_lanczos_of_one_batch_is_that_of_a_single_matrix() -> None:
    model, (inputs, targets) = net(), data()
    values, _ = compute_hessian_eigenthings(
        model, loader(20), cross_entropy, 3, full_dataset=False, mode="lanczos"
    )
    exact = torch.linalg.eigvalsh(dense(model, (inputs[:20], targets[:20])))
    expected = exact[exact.abs().argsort()[-3:]].sort().values
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-5)


def test_an_operator_follows_the_parameters() -> None:
    model = net()
    found = HVPOperator(model, loader(20), cross_entropy)
    vector = torch.ones(found.size, dtype=torch.float64)
    before = found.apply(vector)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(found.apply(vector), dense(model, data()) @ vector)
    assert not torch.allclose(found.apply(vector), before)


def test_batch_norm_uses_and_keeps_its_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().train()
    with torch.no_grad():
        model(data()[0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.warns(UserWarning, match="in train mode, but the Hessian is computed in eval mode"):
        found = HVPOperator(model, loader(20), cross_entropy)
    vector = torch.ones(found.size, dtype=torch.float64)
    product = found.apply(vector)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(product, dense(model.eval(), data()) @ vector)


def test_parameters_that_are_frozen_or_unused() -> None:
    model = net()
    model[0].requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.forward = lambda inputs: model[2](model[1](model[0](inputs)))  # type: ignore[method-assign]
    found = HVPOperator(model, loader(20), cross_entropy)
    assert found.size == 18 + 2
    torch.testing.assert_close(
        torch.stack([found.apply(v) for v in torch.eye(20, dtype=torch.float64)]),
        dense(model, data()),
    )


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
    rounding = 1e-5 * found.largest
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
