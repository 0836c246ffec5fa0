from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.output_gradients import LinearCriterionWarning
from tests.cases import NAMES, Case, case
from tests.reference import flat, gauss_newton, matrix, relative_error

# What is random, what sees the whole batch, and outputs that are no tensor.
REFUSED = ("batch norm, train", "transformer encoder layer, dropout", "dropout", "bert, dropout")
TREES = ("gpt2", "unused")
APART = [name for name in NAMES if name not in (*REFUSED, *TREES, "lstm")]


def net(criterion: Any, targets: Tensor, outputs: int = 3) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
        batch = torch.randn(len(targets), 3).double(), targets
    model_fn, params = hf.functional(model)
    return Case(model, hf.supervised(model_fn, criterion), params, batch)


def expected(found: Case) -> Tensor:
    return gauss_newton(found.loss, found.params, found.batch).diagonal()


@pytest.mark.parametrize("name", APART)
def test_it_is_that_of_the_dense_matrix(name: str) -> None:
    found = case(name)
    diagonal = hf.ggn_diagonal(found.loss, found.params, [found.batch])
    assert {n: leaf.shape for n, leaf in diagonal.items()} == {
        n: leaf.shape for n, leaf in found.params.items()
    }
    assert relative_error(flat(diagonal), expected(found)) < 1e-10


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_it_does_not_depend_on_how_examples_are_cut(size: int) -> None:
    found = case("conv")
    diagonal = hf.ggn_diagonal(found.loss, found.params, [found.batch], examples_per_chunk=size)
    assert relative_error(flat(diagonal), expected(found)) < 1e-10


def test_more_outputs_than_are_pulled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessfunc.recipes.gauss_newton_diagonal._BYTES_AT_ONCE", 600)
    found = net(F.mse_loss, torch.linspace(-1, 1, 35).double().view(5, 7), outputs=7)
    diagonal = hf.ggn_diagonal(found.loss, found.params, [found.batch])
    assert relative_error(flat(diagonal), expected(found)) < 1e-10


CRITERIA = {
    "cross-entropy, some ignored": (F.cross_entropy, torch.tensor([0, 2, -100, 1, -100])),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), torch.tensor([0, 2, 2, 1, 1])),
    "soft targets": (F.cross_entropy, torch.eye(3).double()[[0, 1, 2, 1]] * 0.7 + 0.1),
    "mean squares": (F.mse_loss, torch.linspace(-1, 1, 12).double().view(4, 3)),
    "bce": (F.binary_cross_entropy_with_logits, (torch.arange(12.0) % 2).double().view(4, 3)),
    "of the user": (
        lambda z, y: (z - y).pow(4).mean(),
        torch.linspace(0, 1, 12).double().view(4, 3),
    ),
    "not convex": (lambda z, y: (z - y).cos().mean(), torch.linspace(0, 1, 12).double().view(4, 3)),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria(name: str) -> None:
    found = net(*CRITERIA[name])
    diagonal = hf.ggn_diagonal(found.loss, found.params, [found.batch])
    assert relative_error(flat(diagonal), expected(found)) < 1e-10


def test_the_sum_is_the_trace_and_the_fisher_matrix_has_the_same() -> None:
    found = net(F.cross_entropy, torch.tensor([0, 2, 2, 1, 1]))
    diagonal = flat(hf.ggn_diagonal(found.loss, found.params, [found.batch]))
    fisher = matrix(hf.fvp(found.loss)(found.params, found.batch), found.params)
    assert torch.allclose(diagonal, fisher.diagonal(), rtol=1e-10)
    assert float(diagonal.sum()) == pytest.approx(float(fisher.trace()), rel=1e-10)


def test_the_mean_over_batches_is_that_of_all_examples() -> None:
    found = case("conv")
    x, y = found.batch
    count = len(y)
    batches = list(zip(x.split([count - 1, 1]), y.split([count - 1, 1]), strict=True))
    diagonal = hf.ggn_diagonal(found.loss, found.params, batches)
    assert relative_error(flat(diagonal), expected(found)) < 1e-10
    first = hf.ggn_diagonal(found.loss, found.params, batches, weight=lambda b: len(b[1]) > 1)
    assert (
        relative_error(flat(first), flat(hf.ggn_diagonal(found.loss, found.params, batches[:1])))
        < 1e-12
    )


def test_a_model_that_does_not_go_through_vmap() -> None:
    found = case("lstm")
    with pytest.raises(RuntimeError, match="examples_per_chunk=1"):
        hf.ggn_diagonal(found.loss, found.params, [found.batch])
    diagonal = hf.ggn_diagonal(found.loss, found.params, [found.batch], examples_per_chunk=1)
    assert relative_error(flat(diagonal), expected(found)) < 1e-10


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("name", ["batch norm, train", "dropout"])
def test_examples_that_see_each_other_are_refused(name: str, size: int | None) -> None:
    found = case(name)
    with pytest.raises((ValueError, RuntimeError), match=r"model.eval\(\)"):
        hf.ggn_diagonal(found.loss, found.params, [found.batch], examples_per_chunk=size)


COUPLED = {
    "the mean of outputs": lambda z, y: (z.mean(0) - y).square().sum(),
    "a square, first example ignored": lambda z, y: F.cross_entropy(z[1:], y[1:]).square(),
    "two of the others": lambda z, y: F.cross_entropy(z, y) + (z[1] - z[2]).square().sum(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_criterion_that_couples_examples_is_refused(name: str) -> None:
    targets = torch.zeros(4).double() if name.endswith("outputs") else torch.tensor([0, 2, 1, 1])
    found = net(COUPLED[name], targets[:, None] if targets.is_floating_point() else targets)
    with pytest.raises(ValueError, match="couple examples"):
        hf.ggn_diagonal(found.loss, found.params, [found.batch])


def test_a_criterion_without_second_derivative_has_none() -> None:
    found = net(F.l1_loss, torch.zeros(4, 3).double())
    with pytest.warns(LinearCriterionWarning, match="linear in the model's outputs"):
        assert not flat(hf.ggn_diagonal(found.loss, found.params, [found.batch])).any()


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_lose_their_own_rounding_alone(dtype: torch.dtype, classes: int) -> None:
    found = net(F.cross_entropy, torch.arange(24) % classes, outputs=classes)
    narrow = {name: leaf.to(dtype) for name, leaf in found.params.items()}
    wide = {name: leaf.double() for name, leaf in narrow.items()}
    x, y = found.batch
    x = x.to(dtype)
    exact = hf.ggn_diagonal(found.loss, wide, [(x.double(), y)])
    for size in (None, 4):
        diagonal = hf.ggn_diagonal(found.loss, narrow, [(x, y)], examples_per_chunk=size)
        assert {leaf.dtype for leaf in diagonal.values()} == {torch.float32}
        assert relative_error(flat(diagonal).double(), flat(exact)) < 8 * torch.finfo(dtype).eps


def test_many_examples_are_added_up_in_single_precision_at_least() -> None:
    found = net(F.cross_entropy, torch.arange(2000) % 3)
    narrow = {name: leaf.bfloat16() for name, leaf in found.params.items()}
    batch = found.batch[0].bfloat16(), found.batch[1]
    diagonal = hf.ggn_diagonal(found.loss, narrow, [batch], examples_per_chunk=4)
    wide = {name: leaf.double() for name, leaf in narrow.items()}
    exact = hf.ggn_diagonal(found.loss, wide, [(batch[0].double(), batch[1])])
    assert float(flat(diagonal).sum()) == pytest.approx(float(flat(exact).sum()), rel=0.01)


def test_a_model_that_computes_in_bfloat16() -> None:
    found = net(F.cross_entropy, torch.arange(24) % 3)
    model_fn, params = hf.functional(found.model.float(), dtype=torch.bfloat16)
    batch = found.batch[0].float(), found.batch[1]
    diagonal = hf.ggn_diagonal(hf.supervised(model_fn, F.cross_entropy), params, [batch])
    assert relative_error(flat(diagonal).double(), expected(case_of(found, batch))) < 0.05


def case_of(found: Case, batch: tuple[Tensor, Tensor]) -> Case:
    wide = {name: leaf.double() for name, leaf in found.params.items()}
    return Case(found.model, found.loss, wide, (batch[0].double(), batch[1]))


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("positions", [2, 4])
def test_rows_of_outputs_that_are_no_examples_are_refused(positions: int, size: int | None) -> None:
    found = net(F.mse_loss, torch.zeros(positions, 4, 3).double())
    x = torch.randn(
        4, positions, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    time_first = hf.composed(
        lambda params, batch: found.loss.outputs(params, (batch, None)).transpose(0, 1),
        lambda outputs, batch: outputs.square().mean(),
    )
    with pytest.raises(ValueError, match="first axis"):
        hf.ggn_diagonal(time_first, found.params, [x], examples_per_chunk=size)


def test_chunks_have_an_example_at_least() -> None:
    found = case("mlp")
    with pytest.raises(ValueError, match="examples_per_chunk=0"):
        hf.ggn_diagonal(found.loss, found.params, [found.batch], examples_per_chunk=0)


def test_outputs_that_are_no_tensor_are_refused() -> None:
    found = case("gpt2")
    with pytest.raises(TypeError, match="one tensor"):
        hf.ggn_diagonal(found.loss, found.params, [found.batch])


def test_a_single_batch_and_a_loss_without_halves_are_refused() -> None:
    found = case("mlp")
    with pytest.raises(TypeError, match="single batch"):
        hf.ggn_diagonal(found.loss, found.params, found.batch)
    with pytest.raises(TypeError, match="two halves"):
        hf.ggn_diagonal(lambda p, b: p.sum(), found.params, [found.batch])  # type: ignore[arg-type]


def test_params_and_the_random_stream_stay_as_they_are() -> None:
    found = case("mlp")
    before = {name: leaf.clone() for name, leaf in found.params.items()}
    state = torch.random.get_rng_state()
    hf.ggn_diagonal(found.loss, found.params, [found.batch])
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], leaf) for name, leaf in found.params.items())


class Graph(nn.Module):
    """Sums over the edges of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.layer(torch.zeros_like(x).index_add(0, edges[:, 1], x[edges[:, 0]]))


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("reach", [5, 1])
def test_nodes_of_a_graph_are_no_examples(reach: int, size: int | None) -> None:
    model_fn, params = hf.functional(Graph().double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    nodes = torch.arange(6)
    edges = torch.stack([nodes, (nodes + 1) % 6], 1) if reach > 1 else torch.zeros(6, 2).long()
    batch = (torch.randn(6, 3).double(), edges), nodes % 3
    with pytest.raises((ValueError, RuntimeError), match="example"):
        hf.ggn_diagonal(loss, params, [batch], examples_per_chunk=size)


class Packs(nn.Module):
    """A recurrent net that packs its padded inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.cells(packed)[1][-1])


def test_a_loop_takes_models_that_torch_func_does_not() -> None:
    model = Packs().double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = (torch.randn(3, 4, 2).double(), torch.tensor([4, 2, 3])), torch.tensor([0, 1, 1])
    with pytest.raises(RuntimeError, match="pass `examples_per_chunk=1`"):
        hf.ggn_diagonal(loss, params, [batch])
    diagonal = hf.ggn_diagonal(loss, params, [batch], examples_per_chunk=1)
    right = gauss_newton(loss, params, batch).diagonal()
    assert relative_error(flat(diagonal), right) < 1e-10


def test_a_packed_sequence_is_refused() -> None:
    cells = nn.GRU(2, 3).double()
    model_fn, params = hf.functional(cells)
    loss = hf.supervised(lambda p, x: model_fn(p, x)[1][-1], F.mse_loss)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 2).double() for n in (3, 2)])
    with pytest.raises(ValueError, match="a PackedSequence cannot be divided: pass a padded"):
        hf.ggn_diagonal(loss, params, [(packed, torch.zeros(2, 3).double())])


@pytest.mark.parametrize("size", [None, 1])
def test_a_batch_that_requires_a_gradient(size: int | None) -> None:
    found = net(F.mse_loss, torch.linspace(-1, 1, 15).double().view(5, 3))
    batch = tuple(leaf.clone().requires_grad_() for leaf in found.batch)
    diagonal = hf.ggn_diagonal(found.loss, found.params, [batch], examples_per_chunk=size)
    assert not any(leaf.requires_grad for leaf in diagonal.values())
    assert relative_error(flat(diagonal), expected(found)) < 1e-10
