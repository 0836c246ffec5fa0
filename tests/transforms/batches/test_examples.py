"""How many examples a batch has, and how it is cut, in any container."""

from collections import OrderedDict, deque
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import hessfunc as hf
from tests.containers import OBJECTS, Pair
from tests.reference import hessian, matrix, relative_error

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(6) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def of_objects() -> tuple[hf.Loss, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_fn, params = hf.functional(Net().double())
    outputs = lambda params, batch: model_fn(params, batch.x)  # noqa: E731
    return hf.composed(outputs, F.cross_entropy, targets=lambda batch: batch.y), params


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_counted_and_cut(name: str) -> None:
    make = OBJECTS[name]
    batch = make(X, Y)
    assert hf.examples(batch) == 6
    pieces = hf.microbatches(batch, 4)
    assert [type(piece) for piece in pieces] == [type(batch)] * 2
    assert [len(piece.x) for piece in pieces] == [len(piece.y) for piece in pieces] == [4, 2]
    assert torch.equal(batch.x, X)
    assert torch.equal(torch.cat([piece.x for piece in pieces]), X)
    loss, params = of_objects()
    expected = hessian(loss, params, SimpleNamespace(x=X, y=Y))
    for batches in (pieces, [make(X[:1], Y[:1]), make(X[1:], Y[1:])]):
        matvec = hf.over_batches(hf.hvp(loss))(params, batches)
        assert relative_error(matrix(matvec, params), expected) < 1e-10


class Changing:
    """Other examples in each pass."""

    def __init__(self, *passes: Any) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Any:
        return iter([self.passes.pop(0)])


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_watched(name: str) -> None:
    make, (loss, params) = OBJECTS[name], of_objects()
    matvec = hf.over_batches(hf.hvp(loss))(params, Changing(make(X, Y), make(X + 1e-6, Y)))
    v = hf.random_like(params, 1, seed=0)
    matvec(v)
    with pytest.raises(ValueError, match="saw different examples"):
        matvec(v)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(4, 3), 4),
        ((torch.zeros(4, 3), torch.zeros(4)), 4),
        ({"ids": torch.zeros(4, 7), "mask": torch.zeros(4, 7)}, 4),
        (OrderedDict(ids=torch.zeros(4, 7), mask=torch.zeros(4)), 4),
        (({"x": torch.tensor(1.0), "ids": torch.zeros(4)}, ["a name", None]), 4),
        ((np.zeros((4, 3)), torch.zeros(4)), 4),
        ((MappingProxyType({"x": torch.zeros(4)}), deque([torch.zeros(4, 2)])), 4),
        ((torch.zeros(0, 3), torch.zeros(0)), 0),
        ((pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), torch.zeros(2)), 2),
    ],
)
def test_examples_are_the_first_axis_that_all_arrays_share(batch: Any, count: int) -> None:
    assert hf.examples(batch) == count


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.zeros(9, 2, 3), torch.zeros(2)),
            r"9 of batch\[0\], 2 of batch\[1\].*weight=lambda batch: len\(batch\[1\]\)`",
        ),
        (({"x": torch.zeros(3, 4)}, torch.zeros(12)), r"3 of batch\[0\]\['x'\], 12 of batch\[1\]"),
        (
            SimpleNamespace(x=torch.zeros(5, 2), edges=torch.zeros(2, 9)),
            "5 of batch.x, 2 of",
        ),
        ((pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), torch.zeros(5)), "a guess"),
        ((np.zeros(4), torch.zeros(3)), "a guess"),
    ],
)
def test_a_count_that_is_a_guess_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.examples(batch)
    with pytest.raises(ValueError, match="a batch is divided along first axes|Packed"):
        hf.microbatches(batch, 2)


class TimeFirst(nn.Module):
    """A model of sequences whose first axis is time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh().mean(0)


def test_a_cross_entropy_counts_its_targets_where_first_axes_differ() -> None:
    model_fn, params = hf.functional(TimeFirst().double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batches = [(torch.randn(t, n, 3).double(), torch.arange(n) % 3) for t, n in ((5, 2), (3, 4))]
    found = matrix(hf.over_batches(hf.hvp(loss))(params, batches), params)
    right = sum(len(b[1]) * hessian(loss, params, b) for b in batches) / 6
    assert relative_error(found, right) < 1e-9


@pytest.mark.parametrize(
    "of",
    [
        lambda loss, params, batches: hf.over_batches(hf.hvp(loss))(params, batches)(
            hf.random_like(params, 1, seed=0)
        ),
        lambda loss, params, batches: hf.over_batches(hf.ggnvp(loss), keep=True)(params, batches),
        lambda loss, params, batches: hf.draws(hf.hvp(loss))(params, batches),
        lambda loss, params, batches: hf.block_spectra(loss, params, batches),
        lambda loss, params, batches: hf.ggn_diagonal(loss, params, batches),
        lambda loss, params, batches: hf.landscape(loss, params, batches, params, points=3),
        lambda loss, params, batches: hf.tracking.functional_tracker(loss).measure(
            hf.tracking.functional_tracker(loss).init(params), params, batches
        ),
    ],
    ids=["anew", "kept", "draws", "block_spectra", "ggn_diagonal", "landscape", "tracking"],
)
def test_every_mean_refuses_a_guess(of: Any) -> None:
    model_fn, params = hf.functional(TimeFirst().double())
    # Of torch's own function the number of targets is known.
    loss = hf.supervised(model_fn, lambda outputs, targets: F.cross_entropy(outputs, targets))
    batches = [(torch.randn(t, n, 3).double(), torch.arange(n) % 3) for t, n in ((5, 2), (3, 4))]
    with pytest.raises(ValueError, match=r"first axes.*batch\[1\]"):
        of(loss, params, batches)


def test_examples_that_cannot_be_counted_are_named() -> None:
    with pytest.raises(ValueError, match="batch of type dict has no tensor.*`weight=lambda"):
        hf.examples({"names": ["a", "b"]})


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ({"x": X, "get": (lambda t: lambda: t)(X)}, r"batch\['get'\] is a function"),
        ((X, {Y}), r"batch\[1\] is a set"),
        ((X, iter([Y])), r"batch\[1\] is a list_iterator"),
        (SimpleNamespace(x=X, more=np.array([Y, None], dtype=object)), r"batch.more is a ndarray"),
    ],
)
def test_tensors_that_cannot_be_reached_are_refused(batch: Any, kind: str) -> None:
    for fails in (hf.examples, lambda batch: hf.microbatches(batch, 2)):
        with pytest.raises(TypeError, match=f"{kind} that holds tensors.*in a tuple, a dict or"):
            fails(batch)
    loss = hf.composed(lambda p, b: X @ p["w"], lambda out, _: out.square().mean())
    matvec = hf.over_batches(hf.hvp(loss), weight=lambda _: 1)({"w": X[0]}, [batch])
    with pytest.raises(TypeError, match=kind):
        matvec({"w": X[:1]})


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_microbatches_are_views_of_at_most_that_size(size: int, lengths: list[int]) -> None:
    batch = {"x": torch.randn(5, 2), "more": (torch.arange(5), torch.tensor(0.5), "name")}
    pieces = hf.microbatches(batch, size)
    assert [len(piece["x"]) for piece in pieces] == lengths
    assert torch.equal(torch.cat([piece["more"][0] for piece in pieces]), batch["more"][0])
    assert all(piece["more"][1:] == batch["more"][1:] for piece in pieces)
    storage = batch["x"].untyped_storage().data_ptr()
    assert all(piece["x"].untyped_storage().data_ptr() == storage for piece in pieces)


def test_arrays_and_lists_of_the_examples_are_cut_too() -> None:
    batch = {"x": X, "y": np.arange(6), "names": list("abcdef"), "sizes": [3, 4], "kind": "text"}
    first, second = hf.microbatches(batch, 4)
    assert first["names"] == list("abcd")
    assert second["names"] == list("ef")
    assert second["y"].tolist() == [4, 5]
    assert all(piece["sizes"] == [3, 4] and piece["kind"] == "text" for piece in (first, second))


@pytest.mark.parametrize(
    ("batch", "size", "message"),
    [
        ((X, Y), 0, "size=0: a microbatch has at least one example"),
        ((X, Y[:4]), 2, r"has 6 of batch\[0\], 4 of batch\[1\]: divide it yourself"),
        ("text", 2, "has no tensor in a str"),
        (pack_sequence([X, X]), 2, "a PackedSequence cannot be divided: pass a padded"),
    ],
)
def test_what_cannot_be_cut_is_refused(batch: Any, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.microbatches(batch, size)


def test_an_object_that_cannot_be_copied_is_refused() -> None:
    class Single:
        def __init__(self) -> None:
            self.x = X

        def __copy__(self) -> "Single":
            return self

    assert hf.examples(Single()) == 6
    with pytest.raises(TypeError, match="a Single holds tensors and cannot be copied"):
        hf.microbatches(Single(), 2)


def test_a_named_tuple_is_one_argument_of_the_model() -> None:
    class OfPair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, pair: Pair) -> Tensor:
            return self.layer(pair.x * pair.y)

    model = OfPair().double()
    model_fn, params = hf.functional(model)
    pair = Pair(X, X.cos())
    assert torch.equal(model_fn(params, pair), model(pair))
    loss = hf.supervised(model_fn, F.cross_entropy)

    def plain(params: Any, _: Any) -> Tensor:
        outputs = F.linear(X * X.cos(), params["layer.weight"], params["layer.bias"])
        return F.cross_entropy(outputs, Y)

    pieces = hf.microbatches((pair, Y), 4)
    found = matrix(hf.over_batches(hf.hvp(loss))(params, pieces), params)
    assert relative_error(found, hessian(plain, params, None)) < 1e-10
    with pytest.raises(TypeError, match="a single batch"):
        hf.over_batches(hf.hvp(loss))(params, pair)


def test_a_packed_sequence_is_one_argument_and_counts_its_sequences() -> None:
    cells = nn.GRU(3, 2).double()
    model_fn, params = hf.functional(cells)
    loss = hf.supervised(lambda p, x: model_fn(p, x)[1][-1], F.cross_entropy)
    sequences = [torch.randn(n, 3).double() for n in (4, 3, 1)]
    targets = torch.tensor([0, 1, 1])
    whole = pack_sequence(sequences), targets
    parts = [
        (pack_sequence(sequences[:1]), targets[:1]),
        (pack_sequence(sequences[1:]), targets[1:]),
    ]
    found = matrix(hf.over_batches(hf.hvp(loss))(params, parts), params)
    expected = hessian(loss, params, whole)
    assert relative_error(found, expected) < 1e-10


def test_a_list_with_a_tensor_for_each_example_is_no_unanimous_count() -> None:
    batch = [torch.ones(4)] * 6, [torch.tensor(1)] * 6
    with pytest.raises(ValueError, match="first axes differ"):
        hf.examples(batch)
    with pytest.raises(ValueError, match="divided along first axes"):
        hf.microbatches(batch, 2)


def test_the_advice_counts_what_is_named_as_targets() -> None:
    batch = {"x": torch.ones(6, 4), "y": torch.ones(6), "edges": torch.ones(2, 9)}
    with pytest.raises(ValueError, match=r"weight=lambda batch: len\(batch\['y'\]\)"):
        hf.examples(batch)


def test_lists_of_tensors_without_an_axis_are_divided() -> None:
    pieces = hf.microbatches((X, list(Y)), 4)
    assert [(len(x), y) for x, y in pieces] == [(4, list(Y[:4])), (2, list(Y[4:]))]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_batches(sparse: Any) -> None:
    x = X * (X > 0)
    model_fn, params = hf.functional(nn.Linear(3, 3).double())
    loss = hf.supervised(lambda p, x: x @ p["weight"].mT + p["bias"], F.cross_entropy)
    batch = sparse(x), Y
    for of in (hf.hvp, hf.ggnvp, hf.efvp):
        found = matrix(hf.over_batches(of(loss))(params, [batch]), params)
        expected = matrix(of(hf.supervised(model_fn, F.cross_entropy))(params, (x, Y)), params)
        assert relative_error(found, expected) < 1e-10
    with pytest.raises(ValueError, match="sparse or nested.*`x.to_dense"):
        hf.microbatches(batch, 2)
