from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc.transforms.batches.halves import ReductionWarning
from tests.cases import CLOSED_FORMS, case, closed_form, dense_hessian
from tests.reference import hessian, matrix, relative_error, rows

CUTS = ([15], [3] * 5, [5] * 3, [3, 5, 5, 2])


def cut(batch: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The examples of a batch, in batches of these sizes."""
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


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


def test_batches_of_unequal_weight_are_compiled() -> None:
    problem = closed_form("linear regression")
    batches = cut(problem.batch, [3, 12])
    mean = hf.over_batches(hf.hvp(problem.loss), weight=lambda batch: len(batch[1]))
    (params,) = problem.params.values()

    @partial(torch.compile, fullgraph=True, backend="eager")
    def products(params: Any, block: Any) -> Any:
        return mean(params, batches)(block)

    (name,) = problem.params
    eye = torch.eye(len(params), dtype=params.dtype)
    found = products(problem.params, {name: eye})[name]
    assert (found - problem.hessian).abs().max() < 1e-8


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


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


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


def test_a_batch_cut_into_pieces_has_the_hessian_of_the_whole() -> None:
    model_fn, params = hf.functional(nn.Linear(3, 3).double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    pieces = hf.microbatches((X, Y), 4)
    matvec = hf.over_batches(hf.hvp(loss), keep=True)(params, pieces)
    assert relative_error(matrix(matvec, params), hessian(loss, params, (X, Y))) < 1e-12


@pytest.mark.parametrize(("memory", "evaluations"), [(1e9, 2), (1e5, 5)])
def test_graphs_are_kept_if_they_fit(memory: float, evaluations: int) -> None:
    calls = []
    model_fn, params = hf.functional(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3)))

    def outputs(p: Any, inputs: Tensor) -> Any:
        calls.append(len(inputs))
        return model_fn(p, inputs)

    loss = hf.supervised(outputs, F.cross_entropy)
    batches = [(torch.randn(50, 8), torch.arange(50) % 3) for _ in range(2)]
    v = hf.random_like(params, 1, seed=0)
    kept = hf.over_batches(hf.hvp(loss), weight=hf.examples, keep=True)(params, batches)(v)
    calls.clear()
    matvec = hf.over_batches(hf.hvp(loss), weight=hf.examples, keep="auto")(params, batches)
    assert not calls
    with hf.memory_limit(memory):
        for _ in range(2):
            assert torch.equal(rows(matvec(v)), rows(kept))
    # A graph that does not fit is made once more, and all graphs again in the second pass.
    assert len(calls) == evaluations
