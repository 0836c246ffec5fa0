"""The interface of PyHessian: what it promises, what it mends, and PyHessian itself beside it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
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
from tests.cases import PartlyUnused
from tests.compat.pyhessian.problem import batches, dense, net, net_like, on, residual
from tests.datapath import DATA, data_file

# PyHessian keeps gradients with their graphs, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


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
    assert made.results["eigenvalues"].matvecs <= 3
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = train(lambda: resnet(8, channels=1), digits()[:200], epochs=6, seed=0)
    path = tmp_path_factory.mktemp("weights") / "net.pkl"
    torch.save({"state_dict": nn.DataParallel(model).state_dict()}, path)
    return path


@pytest.mark.parametrize("batch", ["24", "16"])
def test_the_example_analysis_runs_with_one_import_changed(
    batch: str,
    weights: Path,
    peer: Any,
    figures: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--name", "digits", "--depth", "8", "--resume", str(weights)]
    arguments += ["--hessian-batch-size", "24", "--mini-hessian-batch-size", batch]
    assert_analyses_agree(monkeypatch, tmp_path, [*arguments, "--iterations", "20"])


@pytest.mark.slow
def test_the_example_analysis_of_a_trained_resnet20(
    peer: Any, figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = data_file("resnet20_cifar10/resnet20-12fca82f.th").resolve()
    data_file("cifar10")
    monkeypatch.setenv("HESSFUNC_DATA", str(DATA.resolve()))
    arguments = ["--resume", str(weights), "--iterations", "10"]
    arguments += ["--hessian-batch-size", "10", "--mini-hessian-batch-size", "6"]
    assert_analyses_agree(monkeypatch, tmp_path, arguments)


def top(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[values.abs().argmax()])


@pytest.mark.parametrize("source", ["data", "dataloader"])
@pytest.mark.parametrize("chosen", [[0], [5, 4], [1, 0, 2, 3, 4, 5]])
def test_parameters_that_are_set_restrict_the_matrix(source: str, chosen: list[int]) -> None:
    model, found = net(), batches()
    made = face.hessian(model, cross_entropy, **on(source, found))
    made.params = [made.params[i] for i in chosen]
    ends = np.cumsum([0, *(p.numel() for p in model.parameters())])
    at = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in chosen])
    block = dense(net_like(model), source, found)[at][:, at]
    (value,), (vector,) = made.eigenvalues(maxIter=300, tol=1e-4)
    assert value == pytest.approx(top(block), rel=1e-3)
    assert [v.shape for v in vector] == [p.shape for p in made.params]
    assert residual(made, value, vector) < 1e-3 * abs(value)
    assert [g.shape for g in made.gradsH] == [p.shape for p in made.params]


def test_a_gradient_that_is_set_is_differentiated_for_a_single_batch() -> None:
    model, found = net().eval(), batches()
    made = face.hessian(model, cross_entropy, data=found[0])
    made.params, made.gradsH = [made.params[0]], [made.gradsH[0]]
    x, y = found[0]
    decay = sum((p**2).sum() for p in model.parameters())
    loss = cross_entropy(model(x), y) + decay
    own = face.hessian(model, cross_entropy, data=found[0])
    own.gradsH = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    plain = dense(net_like(model), "data", found)
    n0 = model[0].weight.numel()
    assert made.eigenvalues(tol=1e-4)[0][0] == pytest.approx(top(plain[:n0, :n0]), rel=1e-3)
    shifted = plain + 2 * torch.eye(len(plain), dtype=plain.dtype)
    assert own.eigenvalues(maxIter=300, tol=1e-4)[0][0] == pytest.approx(top(shifted), rel=1e-3)
    own.gradsH = [g.detach() for g in own.gradsH]
    with pytest.raises(ValueError, match="gradsH was set to tensors without a graph"):
        own.trace()


def test_products_of_a_subclass_are_used_for_a_data_set() -> None:
    class Regularised(face.hessian):
        def dataloader_hv_product(self, v: Any) -> Any:
            _, product = super().dataloader_hv_product(v)
            product = [h + 3 * x for h, x in zip(product, v, strict=True)]
            return float(face.group_product(product, v)), product

    model, found = net(), batches()
    expected = dense(net_like(model), "dataloader", found)
    expected = expected + 3 * torch.eye(len(expected), dtype=expected.dtype)
    made = Regularised(model, cross_entropy, dataloader=found)
    assert made.eigenvalues(maxIter=300, tol=1e-4)[0][0] == pytest.approx(top(expected), rel=1e-3)
    nodes, _ = made.density(iter=81)
    assert min(nodes[0]) == pytest.approx(float(torch.linalg.eigvalsh(expected)[0]), abs=1e-2)
    with pytest.warns(UserWarning, match="a single batch does not use it"):
        Regularised(model, cross_entropy, data=found[0]).trace(maxIter=2)


def test_a_subclass_may_set_the_attributes_itself() -> None:
    class Own(face.hessian):
        def __init__(self, model: nn.Module, loader: Any, device: str) -> None:
            self.device = device
            self.model, self.criterion, self.data = model.eval(), cross_entropy, loader
            self.full_dataset = True
            self.params, self.gradsH = face.get_params_grad(self.model)

    class Bare(face.hessian):
        def __init__(self) -> None:
            pass

    model, found = net(), batches()
    made = Own(model, found, "cpu")
    expected = top(dense(net_like(model), "dataloader", found))
    assert made.eigenvalues(maxIter=300, tol=1e-4)[0][0] == pytest.approx(expected, rel=1e-3)
    assert set(made.results) == {"eigenvalues"}
    with pytest.raises(AttributeError, match=r"has no attribute '.*': call `super\(\).__init__`"):
        Bare().trace()
    with pytest.raises(AttributeError, match="'Bare' object has no attribute 'anything'"):
        _ = Bare().anything


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda p: [torch.zeros(2, 3)], r"params has tensors of shapes \[\(2, 3\)\] that are no"),
        (lambda p: [p[0], p[0]], "params has a parameter twice"),
    ],
)
def test_tensors_that_are_no_parameters_are_refused(choose: Any, message: str) -> None:
    made = face.hessian(net(), cross_entropy, data=batches()[0])
    made.params = choose(made.params)
    with pytest.raises(ValueError, match=message):
        made.trace()


@pytest.mark.parametrize("option", [{"device": "cpu"}, {"cuda": torch.device("cpu")}])
def test_a_device_is_accepted_and_ignored(option: dict[str, Any]) -> None:
    model, found = net(), batches()
    made = face.hessian(model, cross_entropy, data=found[0], **option)
    made.device = "cuda:7"
    assert made.device == "cpu"
    assert len(made.trace(maxIter=3, tol=0)) == 3


def test_results_are_right_in_inference_mode() -> None:
    model, found = net(), batches()
    expected = top(dense(net_like(model), "dataloader", found))
    with torch.inference_mode():
        made = face.hessian(model, cross_entropy, dataloader=found)
        assert made.eigenvalues(maxIter=300, tol=1e-4)[0][0] == pytest.approx(expected, rel=1e-3)
