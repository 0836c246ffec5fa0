from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import hessfunc as hf
from hessfunc.memory import Footprint
from hessfunc.transforms.batches.reductions import ReductionWarning
from tests.cases import CLOSED_FORMS, case, closed_form, dense_hessian
from tests.graphs import counted_graphs
from tests.reference import hessian, matrix, relative_error, rows

CUTS = ([15], [3] * 5, [5] * 3, [3, 5, 5, 2])


def cut(batch: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The examples of a batch, in batches of these sizes."""
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


# Values


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_however_the_data_is_cut(
    name: str, sizes: list[int], mode: Any, keep: bool
) -> None:
    problem = closed_form(name)
    curvature = hf.over_batches(hf.hvp(problem.loss, mode=mode), keep=keep)
    matvec = curvature(problem.params, cut(problem.batch, sizes))
    error = (matrix(matvec, problem.params) - problem.hessian).abs().max()
    assert error < (1e-6 if mode == "difference" else 1e-8)
    (params,) = problem.params.values()
    column = hf.apply(matvec, {k: torch.ones_like(params) for k in problem.params})
    error = (hf.ravel(column) - problem.hessian.sum(1)).abs().max()
    assert error < (1e-6 if mode == "difference" else 1e-8)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["conv", "lstm", "residual", "batch norm, eval"])
def test_batches_of_a_network_sum_to_the_whole(name: str, keep: bool) -> None:
    found = case(name)
    batches = hf.microbatches(found.batch, 3)
    matvec = hf.over_batches(hf.hvp(found.loss), keep=keep)(found.params, batches)
    assert relative_error(matrix(matvec, found.params), dense_hessian(name)) < 1e-8


def test_keeping_the_graphs_changes_no_bit() -> None:
    found = case("conv")
    batches = hf.microbatches(found.batch, 2)
    v = hf.random_like(found.params, 3, seed=0)
    kept, again = (
        hf.over_batches(hf.hvp(found.loss, chunk_size=1), keep=keep)(found.params, batches)(v)
        for keep in (True, False)
    )
    assert torch.equal(rows(kept), rows(again))


def test_weights_count_what_the_loss_is_a_mean_over() -> None:
    found = case("tied head")
    inputs, targets = found.batch
    targets = targets.clone()
    targets[0, 1:] = targets[1, :2] = -100

    def tokens(batch: Any) -> Tensor:
        return (batch[1] != -100).sum()

    batches = hf.microbatches((inputs, targets), 1)
    weighted = hf.over_batches(hf.hvp(found.loss), weight=tokens)(found.params, batches)
    expected = hessian(found.loss, found.params, (inputs, targets))
    assert relative_error(matrix(weighted, found.params), expected) < 1e-10
    by_examples = hf.over_batches(hf.hvp(found.loss))(found.params, batches)
    with pytest.warns(ReductionWarning, match="no batch has two examples.*Pass .*`weight="):
        assert relative_error(matrix(by_examples, found.params), expected) > 1e-3


def test_sums_of_bfloat16_products_are_in_float32() -> None:
    params = {"w": torch.ones(1, dtype=torch.bfloat16)}
    of_batch = hf.hvp(lambda p, x: (x * p["w"] ** 2 / 2).sum(), chunk_size=1)
    curvature = hf.over_batches(of_batch, weight=hf.examples)
    matvec = curvature(params, [torch.tensor([1.0])] * 1000)
    assert matvec({"w": torch.ones(1, 1, dtype=torch.bfloat16)})["w"].item() == 1.0


class Loader:
    """A list of batches that counts its passes."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


def test_one_pass_serves_a_block_and_none_the_making() -> None:
    found = case("mlp")
    loader = Loader(hf.microbatches(found.batch, 2))
    matvec = hf.over_batches(hf.hvp(found.loss))(found.params, loader)
    assert loader.passes == 0
    matvec(hf.random_like(found.params, 7, seed=0))
    assert loader.passes == 1


def test_kept_graphs_are_made_in_one_pass() -> None:
    found = case("mlp")
    loader = Loader(hf.microbatches(found.batch, 2))
    matvec = hf.over_batches(hf.hvp(found.loss), keep=True)(found.params, loader)
    for _ in range(3):
        matvec(hf.random_like(found.params, 2, seed=0))
    assert loader.passes == 1


# Graphs


def test_one_graph_lives_at_a_time_unless_they_are_kept() -> None:
    found = case("conv")
    v = hf.random_like(found.params, 2, seed=0)

    def most_held(batches: list[Any], *, keep: bool) -> int:
        with counted_graphs() as graphs:
            matvec = hf.over_batches(hf.hvp(found.loss), keep=keep)(found.params, batches)
            matvec(v)
            assert (len(graphs.alive) > 0) == keep
            del matvec
            assert len(graphs.alive) == 0
        return graphs.most

    one = most_held([found.batch], keep=False)
    assert most_held([found.batch] * 5, keep=False) == one > 0
    assert most_held([found.batch] * 5, keep=True) > 4 * one


# Passes that differ


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Ten examples, changed a little each time they are read."""

    def __init__(self, augment: Callable[[Tensor], Tensor]) -> None:
        self.inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).double()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.augment(self.inputs[index]), torch.tensor(index % 3)


def whole(x: Tensor) -> Tensor:
    """No augmentation."""
    return x


def two_products(loader: Any) -> None:
    """Two passes over a loader of (inputs, targets)."""
    found = case("mlp")
    matvec = hf.over_batches(hf.hvp(found.loss))(found.params, loader)
    v = hf.random_like(found.params, 1, seed=0)
    for _ in range(2):
        matvec(v)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Examples(whole), batch_size=4),
        DataLoader(Examples(whole), batch_size=4, drop_last=True),
        DataLoader(Examples(whole), batch_size=4, shuffle=True),
        DataLoader(Examples(whole), batch_size=5, shuffle=True, drop_last=True),
    ],
    ids=["in order", "drop_last", "shuffle", "nothing dropped"],
)
def test_passes_over_the_same_examples_are_accepted(loader: Any) -> None:
    two_products(loader)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Examples(whole), batch_size=4, shuffle=True, drop_last=True),
        DataLoader(Examples(lambda x: x + 1e-3 * torch.randn(3)), batch_size=4),
        DataLoader(Examples(lambda x: x * torch.randint(2, (1,)).mul(2).sub(1)), batch_size=4),
        DataLoader(
            Examples(whole), batch_size=4, sampler=RandomSampler(range(10), replacement=True)
        ),
    ],
    ids=["shuffle with drop_last", "noise", "flips", "with replacement"],
)
def test_passes_over_other_examples_are_refused(loader: Any) -> None:
    with pytest.raises(ValueError, match="saw different examples.*`drop_last`.*list.loader."):
        two_products(loader)


class Passes:
    """Another list of batches at each pass."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.passes.pop(0))


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([(X, Y)], [(X[:5], Y[:5])]),
        ([(X, Y)], [(X, Y), (X[:1], Y[:1])]),
        ([(X, Y)], [(X, Y.flip(0))]),
        ([(X, Y)], [(X.flip(1), Y)]),
        ([(X, Y)], [(-X, Y)]),
        ([(X, Y)], [(torch.cat([X[:5], X[:1]]), Y)]),
        ([(X, Y)], [(X + 1e-7, Y)]),
    ],
    ids=["left out", "repeated", "other targets", "mirrored", "negated", "replaced", "moved"],
)
def test_any_change_of_the_examples_is_seen(first: list[Any], second: list[Any]) -> None:
    with pytest.raises(ValueError, match="saw different examples"):
        two_products(Passes(first, second))


def test_inputs_and_targets_that_change_places_are_seen() -> None:
    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (params["w"] * x - y).square().mean()

    x, y = torch.randn(2, 6, 3).double()
    params = {"w": torch.ones(3).double()}
    matvec = hf.over_batches(hf.hvp(loss))(params, Passes([(x, y)], [(y, x)]))
    matvec({"w": torch.ones(1, 3).double()})
    with pytest.raises(ValueError, match="saw different examples"):
        matvec({"w": torch.ones(1, 3).double()})


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_order_of_examples_whose_sum_is_zero_does_not_matter(scale: float) -> None:
    x = torch.randn(20, 3).double() * scale
    x = torch.cat([x, -x])
    y = torch.zeros(40, dtype=torch.int64)
    order = torch.randperm(40)
    two_products(Passes([(x, y)], hf.microbatches((x[order], y[order]), 7)))


@pytest.mark.parametrize("absent", [float("nan"), float("inf"), float("-inf")])
def test_entries_that_are_not_finite_and_not_used_are_no_difference(absent: float) -> None:
    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (x @ params["w"])[y.isfinite()].square().mean()

    params, y = {"w": torch.ones(3).double()}, torch.tensor([1.0, absent, 2.0, absent, 0.0, 1.0])
    matvec = hf.over_batches(hf.hvp(loss))(params, [(X, y)])
    first, again = (rows(matvec({"w": torch.ones(1, 3).double()})) for _ in range(2))
    assert torch.equal(first, again)


# What is refused


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("batches", "name"),
    [
        (lambda: ((X, Y) for _ in range(3)), "generator"),
        (lambda: iter([(X, Y)]), "list_iterator"),
        (lambda: zip([X], [Y], strict=True), "zip"),
        (lambda: iter(DataLoader(TensorDataset(X, Y))), "_SingleProcessDataLoaderIter"),
    ],
    ids=["generator", "iterator", "zip", "loader's iterator"],
)
def test_what_can_be_read_once_is_refused(batches: Any, name: str, keep: bool) -> None:
    found = case("mlp")
    curvature = hf.over_batches(hf.hvp(found.loss), keep=keep)
    with pytest.raises(TypeError, match=f"a {name}, which can be read only once.*pass list"):
        curvature(found.params, batches())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("batches", "weight"),
    [([], hf.examples), (DataLoader(TensorDataset(X[:0])), hf.examples), ([(X, Y)], lambda _: 0)],
    ids=["no batch", "empty loader", "no weight"],
)
def test_no_data_is_refused(batches: Any, weight: Any, keep: bool) -> None:
    found = case("mlp")
    curvature = hf.over_batches(hf.hvp(found.loss), weight=weight, keep=keep)
    with pytest.raises(ValueError, match="sum to zero: check that the loader is not empty"):
        curvature(found.params, batches)(hf.random_like(found.params, 1, seed=0))


@pytest.mark.parametrize("keep", [False, True])
def test_changed_parameters_are_refused(keep: bool) -> None:
    found = case("mlp")
    curvature = hf.over_batches(hf.hvp(found.loss), keep=keep)
    matvec = curvature(found.params, hf.microbatches(found.batch, 2))
    with torch.no_grad():
        found.model[2].bias.add_(1.0)
    with pytest.raises(RuntimeError, match="'2.bias' has changed in place"):
        matvec(hf.random_like(found.params, 1, seed=0))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
def test_batch_statistics_are_refused_for_several_batches(mode: Any, keep: bool) -> None:
    found = case("batch norm, train")
    v = hf.random_like(found.params, 1, seed=0)
    curvature = hf.over_batches(hf.hvp(found.loss, mode=mode), keep=keep)
    one = curvature(found.params, [found.batch])(v)
    expected = hf.hvp(found.loss, mode=mode)(found.params, found.batch)(v)
    torch.testing.assert_close(rows(one), rows(expected))
    with pytest.raises(ValueError, match=r"BatchNorm '1'.*call `model.eval\(\)`.*or use one batch"):
        curvature(found.params, [found.batch, found.batch])(v)


@pytest.mark.parametrize("keep", [False, True])
def test_a_loss_in_place_of_a_curvature_function_is_named(keep: bool) -> None:
    found = case("mlp")
    with pytest.raises(TypeError, match=r"not a Loss: pass hessfunc.hvp\(loss\)"):
        hf.apply(
            hf.over_batches(found.loss, keep=keep)(found.params, [found.batch]),
            found.params,
        )


def test_a_single_batch_in_place_of_batches_is_named() -> None:
    found = case("mlp")
    curvature = hf.over_batches(hf.hvp(found.loss))
    for batch in (found.batch, found.batch[0], {"x": found.batch[0]}):
        with pytest.raises(TypeError, match=r"a single batch: pass a list of batches, \[batch\]"):
            curvature(found.params, batch)


def test_batches_of_weight_zero_are_left_out() -> None:
    found = case("mlp")
    nothing = tuple(
        leaf * float("nan") if leaf.is_floating_point() else leaf for leaf in found.batch
    )
    batches = [found.batch, nothing]
    weights = {id(found.batch): 3.0, id(nothing): 0.0}
    for keep in (False, True):
        curvature = hf.over_batches(hf.hvp(found.loss), weight=lambda b: weights[id(b)], keep=keep)
        product = matrix(curvature(found.params, batches), found.params)
        expected = matrix(hf.hvp(found.loss)(found.params, found.batch), found.params)
        assert relative_error(product, expected) < 1e-12


# Torch's random stream


def test_the_random_stream_stays() -> None:
    found = case("dropout")
    state = torch.get_rng_state()
    matvec = hf.over_batches(hf.hvp(found.loss))(found.params, hf.microbatches(found.batch, 2))
    matvec(hf.random_like(found.params, 5, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_making_of_a_matvec_does_not_start_the_loader() -> None:
    found = case("mlp")
    state = torch.get_rng_state()
    hf.over_batches(hf.hvp(found.loss))(found.params, DataLoader(TensorDataset(X, Y)))
    assert torch.equal(torch.get_rng_state(), state)


# Cutting


def test_a_batch_cut_into_pieces_has_the_hessian_of_the_whole() -> None:
    model_fn, params = hf.functional(nn.Linear(3, 3).double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    pieces = hf.microbatches((X, Y), 4)
    matvec = hf.over_batches(hf.hvp(loss), keep=True)(params, pieces)
    assert relative_error(matrix(matvec, params), hessian(loss, params, (X, Y))) < 1e-12


def test_more_batches_take_no_more_memory() -> None:
    of = case("mlp")
    peaks = []
    for count in (1, 4):
        matvec = hf.over_batches(hf.hvp(of.loss))(of.params, [of.batch] * count)
        block = hf.random_like(of.params, 1, seed=0)
        with Footprint() as memory:
            matvec(block)
        peaks.append(memory.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)
