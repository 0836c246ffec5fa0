"""The interface of PyHessian: what it promises, what it mends, and PyHessian itself beside it."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.resnet import resnet
from hessfunc.compat import pyhessian as face
from tests.cases import PartlyUnused, Residual
from tests.datapath import DATA, data_file
from tests.reference import hessian as dense_hessian

# PyHessian keeps gradients with their graphs, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")

Batch = tuple[Tensor, Tensor]

# The example analysis of PyHessian, step by step; a run differs in the first import alone.
SCRIPT = """
import argparse

import numpy as np
import torch
from {home} import hessian
from hessfunc.compat.pyhessian import get_esd_plot
from hessfunc.app.problems.data import cifar10, digits
from hessfunc.app.problems.resnet import resnet

parser = argparse.ArgumentParser()
parser.add_argument("--mini-hessian-batch-size", type=int, default=200)
parser.add_argument("--hessian-batch-size", type=int, default=200)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--cuda", action="store_true")
parser.add_argument("--resume", required=True)
parser.add_argument("--depth", type=int, default=20)
parser.add_argument("--name", default="cifar10")
parser.add_argument("--iterations", type=int, default=100)
args = parser.parse_args()
torch.manual_seed(args.seed)

images = dict(cifar10=cifar10, digits=digits)[args.name]()
batches = images[: args.hessian_batch_size].batches(args.mini_hessian_batch_size)

model = resnet(args.depth, channels=images.inputs.shape[1])
model = torch.nn.DataParallel(model)
model.load_state_dict(torch.load(args.resume, map_location="cpu")["state_dict"])
criterion = torch.nn.CrossEntropyLoss()
model.eval()

if len(batches) == 1:
    hessian_comp = hessian(model, criterion, data=batches[0], cuda=args.cuda)
else:
    hessian_comp = hessian(model, criterion, dataloader=batches, cuda=args.cuda)

top_eigenvalues, top_eigenvectors = hessian_comp.eigenvalues(maxIter=args.iterations)
trace = hessian_comp.trace(maxIter=args.iterations)
density_eigen, density_weight = hessian_comp.density(iter=args.iterations)

print("Top Eigenvalues: ", top_eigenvalues)
print("Trace: ", np.mean(trace))
get_esd_plot(density_eigen, density_weight)
"""


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyHessian, with the function that its density takes and torch has dropped."""
    with warnings.catch_warnings():
        # Of invalid escapes in its source.
        warnings.simplefilter("ignore", SyntaxWarning)
        module = pytest.importorskip("pyhessian", reason="pip install PyHessian: not installed")

    def eig(T: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        assert eigenvectors
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    monkeypatch.setattr(torch, "eig", eig)
    return module


@pytest.fixture
def figures() -> Iterator[Any]:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    yield plt
    plt.close("all")


def net() -> nn.Sequential:
    """81 parameters, with batch statistics that are not those of the data."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    return model


def batches() -> list[Batch]:
    """Two batches of unequal size."""
    return [(torch.randn(k, 4), torch.randint(3, (k,))) for k in (20, 7)]


def on(source: str, found: Sequence[Batch]) -> dict[str, Any]:
    """The arguments of a `hessian` of the first batch, or of all of them."""
    return {"data": {"data": found[0]}, "dataloader": {"dataloader": list(found)}}[source]


def dense(model: nn.Module, source: str, found: Sequence[Batch]) -> Tensor:
    """The Hessian in eval mode, in float64, by double backward."""
    model = model.double().eval()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, cross_entropy)
    used = found[:1] if source == "data" else found
    parts = [len(y) * dense_hessian(loss, params, (x.double(), y)) for x, y in used]
    model.float()
    return torch.stack(parts).sum(0) / sum(len(y) for _, y in used)


def residual(found: Any, value: float, vector: Sequence[Tensor]) -> float:
    """|Hv - value v| / |v|, by the products of a `hessian`."""
    image = found.dataloader_hv_product(vector)[1]
    off = [h - value * v for h, v in zip(image, vector, strict=True)]
    return float((face.group_product(off, off) / face.group_product(vector, vector)).sqrt())


def spectrum(nodes: Any, weights: Any, n: int) -> hf.results.Density:
    """Nodes and weights with the error bars of their quadrature."""
    return hf.results.Density(
        nodes=torch.tensor(np.array(nodes), dtype=torch.float64),
        weights=torch.tensor(np.array(weights), dtype=torch.float64),
        n=n,
        matvecs=0,
        passes=0,
        reason="",
        seed=None,
    )


def assert_same_eigenvalues(ours: Any, theirs: Any, products: face.hessian) -> None:
    """Two (values, vectors) agree within the sum of their residuals, measured with one matrix."""
    for value, vector, other, along in zip(*ours, *theirs, strict=True):
        radius = residual(products, value, vector) + residual(products, other, along)
        assert abs(value - other) <= radius + 1e-5 * abs(value)


def assert_same_trace(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Two lists of samples agree within four standard errors of the difference of their means."""
    stderr = math.hypot(*(np.std(x, ddof=1) / math.sqrt(len(x)) for x in (ours, theirs)))
    assert abs(np.mean(ours) - np.mean(theirs)) <= 4 * stderr


def assert_same_density(ours: Any, theirs: Any, n: int) -> None:
    """The 99.9 % bands of two distribution functions overlap everywhere."""
    found, other = spectrum(*ours, n), spectrum(*theirs, n)
    x = torch.cat([found.nodes.flatten(), other.nodes.flatten()]).sort().values
    x = torch.cat([x, (x[1:] + x[:-1]) / 2])
    (low, high), (low_too, high_too) = (
        density.cdf_bounds(x, level=0.999, simultaneous=True) for density in (found, other)
    )
    assert bool((low <= high_too).all())
    assert bool((low_too <= high).all())


@pytest.mark.parametrize("source", ["data", "dataloader"])
def test_pyhessian_agrees_on_a_small_net(peer: Any, source: str) -> None:
    model, found = net(), batches()
    ours = face.hessian(model, cross_entropy, **on(source, found))
    theirs = peer.hessian(model.eval(), cross_entropy, cuda=False, **on(source, found))
    n = sum(p.numel() for p in model.parameters())

    pairs = theirs.eigenvalues(top_n=3, maxIter=1000, tol=1e-6)
    assert max(residual(ours, value, v) for value, v in zip(*pairs, strict=True)) < 0.02
    assert_same_eigenvalues(ours.eigenvalues(top_n=3), pairs, ours)
    # With a tolerance that nothing is below, the whole budget is used.
    assert_same_trace(ours.trace(maxIter=200, tol=0.0), theirs.trace(maxIter=200, tol=-math.inf))
    assert_same_density(ours.density(iter=20, n_v=8), theirs.density(iter=20, n_v=8), n)


@pytest.mark.parametrize("source", ["data", "dataloader"])
def test_results_are_those_of_the_dense_hessian(source: str) -> None:
    model, found = net(), batches()
    expected = dense(model, source, found)
    exact = torch.linalg.eigvalsh(expected)
    exact = exact[exact.abs().argsort(descending=True)]

    made = face.hessian(model, cross_entropy, **on(source, found))
    values, _ = made.eigenvalues(top_n=4, tol=1e-4)
    torch.testing.assert_close(torch.tensor(values).double(), exact[:4], rtol=1e-4, atol=0)
    trace = made.trace(maxIter=400)
    low, high = made.results["trace"].interval(0.999)
    assert low < float(expected.trace()) < high
    assert np.mean(trace) == pytest.approx(made.results["trace"].value)
    made.density(iter=20, n_v=4)
    lower, upper = made.results["density"].cdf_bounds(exact, level=0.999, simultaneous=True)
    share = (exact[:, None] >= exact[None]).double().mean(1)
    assert bool((lower <= share + 1e-9).all())
    assert bool((share <= upper + 1e-9).all())


def test_shapes_types_and_order() -> None:
    model = net()
    made = face.hessian(model, cross_entropy, dataloader=batches())
    values, vectors = made.eigenvalues(top_n=3)
    assert [type(value) for value in values] == [float] * 3
    assert all(abs(a) >= abs(b) for a, b in pairwise(values))
    assert [[v.shape for v in vector] for vector in vectors] == [
        [p.shape for p in model.parameters()]
    ] * 3
    inner = torch.tensor([[face.group_product(a, b) for a in vectors] for b in vectors])
    torch.testing.assert_close(inner, torch.eye(3), rtol=0, atol=1e-5)
    trace = made.trace(maxIter=7)
    assert [type(sample) for sample in trace] == [float] * 7
    nodes, weights = made.density(iter=9, n_v=2)
    assert [len(run) for run in (*nodes, *weights)] == [9] * 4
    assert {type(x) for run in (*nodes, *weights) for x in run} == {float}
    assert [sum(run) for run in weights] == pytest.approx([1, 1])
    assert [type(made.results[name]) for name in ("eigenvalues", "trace", "density")] == [
        hf.results.Eigenpairs,
        hf.results.Estimate,
        hf.results.Density,
    ]


def test_attributes_that_scripts_read() -> None:
    model, found = net(), batches()
    made = face.hessian(model, cross_entropy, data=found[0])
    assert all(a is b for a, b in zip(made.params, model.parameters(), strict=True))
    assert (made.device, made.full_dataset, made.data) == ("cpu", False, found[0])
    assert made.model is model
    assert torch.equal(made.inputs, found[0][0])
    assert torch.equal(made.targets, found[0][1])
    for source in ("data", "dataloader"):
        made = face.hessian(model, cross_entropy, **on(source, found))
        v = [torch.randn_like(p) for p in made.params]
        flat = torch.cat([x.flatten() for x in v])
        expected = dense(net_like(model), source, found).float() @ flat
        curvature, image = made.dataloader_hv_product(v)
        by_graph = face.hessian_vector_product(made.gradsH, made.params, v)
        for product in (image, by_graph):
            torch.testing.assert_close(
                torch.cat([x.flatten() for x in product]), expected, rtol=1e-4, atol=1e-5
            )
        assert curvature == pytest.approx(float(flat @ expected), rel=1e-4)


def net_like(model: nn.Module) -> nn.Module:
    other = net()
    other.load_state_dict(model.state_dict())
    return other


def test_torchs_seed_makes_results_the_same() -> None:
    model, found = net(), batches()

    def run() -> Any:
        torch.manual_seed(3)
        made = face.hessian(model, cross_entropy, data=found[0])
        return made.eigenvalues()[0], made.trace(maxIter=4), made.density(iter=5)

    first = run()
    assert run() == first
    made = face.hessian(model, cross_entropy, data=found[0])
    assert made.trace(maxIter=4) != first[1]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_in_eval_mode_and_left_as_it_was(training: bool) -> None:
    model, found = net(), batches()
    model.train(training)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = face.hessian(model, cross_entropy, dataloader=found)
    value = made.eigenvalues()[0][0]
    made.trace(maxIter=3)
    made.density(iter=4)
    assert made.gradsH
    assert [module.training for module in model.modules()] == [training] * 5
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    assert bool((model[0].weight.grad == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])
    largest = torch.linalg.eigvalsh(dense(model, "dataloader", found)).abs().max()
    assert value == pytest.approx(float(largest), rel=1e-3)


def test_parameters_are_those_of_the_moment() -> None:
    model, found = net(), batches()
    made = face.hessian(model, cross_entropy, data=found[0])
    made.eigenvalues()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    largest = torch.linalg.eigvalsh(dense(net_like(model), "data", found)).abs().max()
    assert made.eigenvalues()[0][0] == pytest.approx(float(largest), rel=1e-3)


def test_parameters_that_are_thawed_later_count() -> None:
    model, found = net(), batches()
    model[0].requires_grad_(False)
    made = face.hessian(model, cross_entropy, data=found[0])
    model.requires_grad_(True)
    _, (vector,) = made.eigenvalues()
    assert [v.shape for v in vector] == [p.shape for p in made.params]
    product = face.hessian_vector_product(made.gradsH, made.params, vector)
    torch.testing.assert_close(
        list(product), made.dataloader_hv_product(vector)[1], rtol=1e-3, atol=1e-4
    )


def test_a_parameter_that_the_loss_does_not_use_has_zeros(peer: Any) -> None:
    model, batch = PartlyUnused(), (torch.randn(5, 3), torch.randint(4, (5,)))
    arguments = (model, lambda outputs, y: cross_entropy(outputs[0], y) + outputs[1], batch)
    made = face.hessian(*arguments)
    _, (vector,) = made.eigenvalues()
    unused = [i for i, (name, _) in enumerate(model.named_parameters()) if "unused" in name]
    image = face.hessian_vector_product(made.gradsH, made.params, vector)
    for i in unused:
        assert vector[i].abs().max() < 1e-3
        assert not image[i].any()
    _, gradients = face.get_params_grad(model)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    with pytest.raises(AssertionError, match="Expected output to be a torch.Tensor"):
        peer.hessian(*arguments, cuda=False).eigenvalues()


def test_two_hessians_of_one_model_are_each_its_own(peer: Any) -> None:
    model, found = net().eval(), batches()

    def values(make: Any, **options: Any) -> list[float]:
        made = [make(model, cross_entropy, data=batch, **options) for batch in (found[1], found[0])]
        return made[1].eigenvalues(maxIter=1000, tol=1e-4)[0]

    expected = float(torch.linalg.eigvalsh(dense(net_like(model), "data", found)).abs().max())
    assert values(face.hessian) == pytest.approx([expected], rel=1e-3)
    assert values(peer.hessian, cuda=False)[0] > 1.2 * expected


def test_eigenvalues_that_miss_the_tolerance_are_warned_of() -> None:
    made = face.hessian(net(), cross_entropy, data=batches()[0])
    with pytest.warns(UserWarning, match=r"1 of 1 eigenpairs have not converged to tol=1e-05"):
        made.eigenvalues(maxIter=3, tol=1e-5)
    assert made.results["eigenvalues"].matvecs == 3
    assert not made.results["eigenvalues"].converged.any()


def test_tolerances_are_what_they_say(peer: Any) -> None:
    model, found = net().eval(), batches()
    ours = face.hessian(model, cross_entropy, data=found[0])
    theirs = peer.hessian(model, cross_entropy, data=found[0], cuda=False)
    value, along = ours.eigenvalues(tol=1e-3)
    other, across = theirs.eigenvalues(tol=1e-3)
    assert residual(ours, value[0], along[0]) < 1e-3 * value[0]
    assert residual(ours, other[0], across[0]) > 3e-3 * value[0]

    def half_width(samples: list[float]) -> float:
        return 1.96 * np.std(samples, ddof=1) / math.sqrt(len(samples)) / np.mean(samples)

    assert half_width(ours.trace(tol=0.1, maxIter=2000)) < 0.1
    runs = [theirs.trace(tol=0.1, maxIter=2000) for _ in range(10)]
    assert np.median([half_width(samples) for samples in runs if len(samples) > 1]) > 0.2


def test_the_trace_stops_where_its_interval_is_narrow_enough() -> None:
    made = face.hessian(net(), cross_entropy, data=batches()[0])
    samples = made.trace(maxIter=2000, tol=0.1)
    low, high = made.results["trace"].interval(0.95)
    assert (high - low) / 2 <= 0.1 * np.mean(samples)
    assert 10 < len(samples) < 2000
    assert len(made.trace(maxIter=50, tol=1e-3)) == 50
    assert len(made.trace(maxIter=1)) == 2
    # Nothing is below it, in PyHessian too.
    assert len(made.trace(maxIter=50, tol=-math.inf)) == 50


def test_a_krylov_space_that_is_exhausted_ends_the_density() -> None:
    # A matrix of rank one, of 5 parameters: two steps span the space.
    model, x = nn.Linear(5, 1, bias=False), torch.randn(1, 5)
    made = face.hessian(
        model, lambda out, y: (out - y).square().mean(), data=(x, torch.zeros(1, 1))
    )
    nodes, weights = made.density(iter=50)
    assert [len(run) for run in (*nodes, *weights)] == [2, 2]
    torch.testing.assert_close(
        torch.tensor(nodes[0]),
        torch.tensor([0.0, 2 * float(x.square().sum())]),
        atol=1e-5,
        rtol=1e-5,
    )
    assert sum(weights[0]) == pytest.approx(1)


def test_cuda_is_where_the_parameters_are() -> None:
    model, found = net(), batches()
    made = [face.hessian(model, cross_entropy, data=found[0], cuda=cuda) for cuda in (True, False)]
    assert [h.device for h in made] == ["cpu", "cpu"]
    assert made[0].eigenvalues()[0] == pytest.approx(made[1].eigenvalues()[0], rel=1e-4)


@pytest.mark.gpu
def test_batches_go_to_the_gpu_of_the_parameters() -> None:
    model, found = net(), batches()
    expected = face.hessian(model, cross_entropy, dataloader=found).eigenvalues()[0]
    made = face.hessian(nn.DataParallel(model.cuda()), cross_entropy, dataloader=found, cuda=False)
    assert made.device == "cuda:0"
    assert made.eigenvalues()[0] == pytest.approx(expected, rel=1e-3)


def test_a_model_that_is_wrapped_for_data_parallelism_is_unwrapped() -> None:
    model, found = net(), batches()
    made = face.hessian(nn.DataParallel(model), cross_entropy, data=found[0])
    made.trace(maxIter=2)
    assert list(made.results["trace"].by_leaf) == [name for name, _ in model.named_parameters()]


def test_what_is_refused() -> None:
    model, found = net(), batches()
    for arguments in ({}, {"data": found[0], "dataloader": found}):
        with pytest.raises(ValueError, match="either one batch, `data=`, or batches"):
            face.hessian(model, cross_entropy, **arguments)
    made = face.hessian(model, cross_entropy, dataloader=(batch for batch in found))
    with pytest.raises(TypeError, match="can be read only once"):
        made.trace()
    with pytest.raises(ValueError, match="no parameter of Sequential requires a gradient"):
        face.hessian(model.requires_grad_(False), cross_entropy, data=found[0])


def test_random_augmentation_is_refused() -> None:
    class Augmented:
        def __iter__(self) -> Iterator[Batch]:
            yield torch.randn(20, 4), torch.zeros(20, dtype=torch.long)

    made = face.hessian(net(), cross_entropy, dataloader=Augmented())
    with pytest.raises(ValueError, match="saw different examples"):
        made.eigenvalues()


def test_lists_of_tensors_are_vectors(peer: Any) -> None:
    def vector() -> list[Tensor]:
        return [torch.randn(3, 2), torch.randn(4)]

    x, y, z = vector(), vector(), vector()
    assert float(face.group_product(x, y)) == pytest.approx(float(peer.group_product(x, y)))
    ours, theirs = ([v.clone() for v in x] for _ in range(2))
    assert face.group_add(ours, y, alpha=-2.0) is ours
    peer.group_add(theirs, y, alpha=-2.0)
    torch.testing.assert_close(ours, theirs)
    assert float(face.group_product(face.normalization(x), face.normalization(x))) == pytest.approx(
        1
    )
    torch.testing.assert_close(face.normalization(x), peer.normalization(x), rtol=1e-5, atol=1e-6)
    basis = [face.normalization(x), face.orthnormal(y, [face.normalization(x)])]
    before = [v.clone() for v in z]
    found = face.orthnormal(z, basis)
    assert all(torch.equal(a, b) for a, b in zip(z, before, strict=True))
    assert [float(face.group_product(found, b)) for b in basis] == pytest.approx([0, 0], abs=1e-6)
    torch.testing.assert_close(found, peer.orthnormal(z, basis), rtol=1e-4, atol=1e-5)


def test_a_vector_of_zeros_stays_as_it_is() -> None:
    assert not any(v.any() for v in face.normalization([torch.zeros(3), torch.zeros(2)]))


@pytest.mark.parametrize("options", [{}, {"num_bins": 300, "sigma_squared": 1e-2, "overhead": 0.5}])
def test_the_density_is_a_mean_of_gaussians(options: dict[str, float]) -> None:
    generator = np.random.default_rng(0)
    nodes = np.sort(generator.normal(0, 3, (2, 6)))
    weights = generator.dirichlet(np.ones(6), 2)
    found, grid = face.density_generate(nodes.tolist(), weights.tolist(), **options)
    overhead, width = options.get("overhead", 0.01), options.get("sigma_squared", 1e-5)
    low, high = nodes[:, 0].mean() - overhead, nodes[:, -1].mean() + overhead
    np.testing.assert_allclose(grid, np.linspace(low, high, options.get("num_bins", 10000)))
    variance = width * max(1, high - low)
    expected = np.zeros_like(grid)
    for run in range(2):
        for node, weight in zip(nodes[run], weights[run], strict=True):
            expected += weight * np.exp(-((grid - node) ** 2) / (2 * variance))
    np.testing.assert_allclose(found, expected / (expected.sum() * (grid[1] - grid[0])), rtol=1e-9)


def test_each_density_has_a_figure_of_its_own(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    axes = [face.get_esd_plot([[0.0, shift + 1.0]], [[0.5, 0.5]]) for shift in (0, 1)]
    assert [len(ax.lines) for ax in axes] == [1, 1]
    assert [ax.get_xlim() for ax in axes] == [(-1, 2), (-1, 3)]
    assert axes[0].get_yscale() == "log"
    assert (tmp_path / "example.pdf").read_bytes().startswith(b"%PDF")


def layers() -> nn.Sequential:
    """Two layers that read the same on a skip path, and one after them."""
    branches = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return nn.Sequential(Residual(branches), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("source", ["data", "dataloader"])
def test_traces_of_activations_are_those_of_the_dense_hessians(source: str) -> None:
    model, found = layers(), batches()
    used = found[:1] if source == "data" else found
    names = ["0.branch.0", "0.branch.2", "2"]
    expected = dict.fromkeys(names, 0.0)
    for x, y in used:
        for name in names:
            loss, zeros = hf.activations(
                model.double(), cross_entropy, lambda n, _, name=name: n == name
            )
            matrix = dense_hessian(loss, zeros(x.double()), (x.double(), y))
            expected[name] += len(y) * float(matrix.trace()) / sum(len(t) for _, t in used)
    model.float()

    made = face.hessian_with_activation(model, cross_entropy, **on(source, found))
    made.insert_hook("branch.0")
    made.insert_hook("2")
    samples = np.array(made.trace_activ(maxIter=400, tol=1e-6))
    assert samples.shape == (400, 3)
    assert list(made.results["trace_activ"].by_leaf) == [f"{name}[0]" for name in names]
    np.testing.assert_allclose(
        samples.mean(0), list(made.results["trace_activ"].by_leaf.values()), rtol=1e-6
    )
    stderr = samples.std(0, ddof=1) / math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - list(expected.values())) <= 4 * stderr).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_traces_of_weights_are_those_of_the_diagonal_blocks() -> None:
    model, found = layers(), batches()
    matrix = dense(net_of(model), "dataloader", found).diagonal()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parts = dict(zip(sizes, matrix.split(list(sizes.values())), strict=True))
    made = face.hessian_with_activation(model, cross_entropy, dataloader=found)
    samples = np.array(made.trace(maxIter=400, tol=1e-6, param_name="weight"))
    expected = [float(part.sum()) for name, part in parts.items() if "weight" in name]
    stderr = samples.std(0, ddof=1) / math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) <= 4 * stderr).all()


def net_of(model: nn.Module) -> nn.Module:
    other = layers()
    other.load_state_dict(model.state_dict())
    return other


def test_layers_that_cannot_be_chosen_are_refused() -> None:
    model, found = layers(), batches()
    made = face.hessian_with_activation(model, cross_entropy, dataloader=found[::-1])
    with pytest.raises(ValueError, match="no layer is chosen"):
        made.trace_activ()
    with pytest.raises(
        ValueError, match="no layer name ends with 'conv': the layers are 0.branch.0"
    ):
        made.insert_hook("conv")
    with pytest.raises(
        ValueError,
        match="contains param_name='conv.weight': the parameters are 0.branch.0.weight, ",
    ):
        made.trace()
    made.insert_hook("2")
    with pytest.raises(ValueError, match="a batch of 20 examples follows a first batch of 7"):
        made.trace_activ()


def analysis(
    home: str, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]
) -> dict[str, Any]:
    """The names that the script leaves, run with ``hessian`` of this package."""
    monkeypatch.setattr(sys, "argv", ["analysis.py", *arguments])
    names: dict[str, Any] = {}
    exec(compile(SCRIPT.format(home=home), f"analysis with {home}", "exec"), names)
    return names


def assert_analyses_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = analysis("hessfunc.compat.pyhessian", monkeypatch, arguments)
    theirs = analysis("pyhessian", monkeypatch, arguments)
    assert_same_eigenvalues(
        *((run["top_eigenvalues"], run["top_eigenvectors"]) for run in (ours, theirs)),
        ours["hessian_comp"],
    )
    assert_same_trace(ours["trace"], theirs["trace"])
    n = sum(p.numel() for p in ours["model"].parameters())
    assert_same_density(
        *((run["density_eigen"], run["density_weight"]) for run in (ours, theirs)), n
    )
    assert (tmp_path / "example.pdf").is_file()


@pytest.mark.parametrize("batch", ["30", "20"])
def test_the_example_analysis_runs_with_one_import_changed(
    batch: str, peer: Any, figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train(lambda: resnet(8, channels=1), digits()[:200], epochs=6, seed=0)
    torch.save({"state_dict": nn.DataParallel(model).state_dict()}, tmp_path / "net.pkl")
    arguments = ["--name", "digits", "--depth", "8", "--resume", str(tmp_path / "net.pkl")]
    arguments += ["--hessian-batch-size", "30", "--mini-hessian-batch-size", batch]
    assert_analyses_agree(monkeypatch, tmp_path, [*arguments, "--iterations", "25"])


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["20", "12"])
def test_the_example_analysis_of_a_trained_resnet20(
    batch: str, peer: Any, figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = data_file("resnet20_cifar10/resnet20-12fca82f.th").resolve()
    data_file("cifar10")
    monkeypatch.setenv("HESSFUNC_DATA", str(DATA.resolve()))
    arguments = ["--resume", str(weights), "--iterations", "20"]
    arguments += ["--hessian-batch-size", "20", "--mini-hessian-batch-size", batch]
    assert_analyses_agree(monkeypatch, tmp_path, arguments)
