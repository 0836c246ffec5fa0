import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from bench.resident import peak_above
from hessfunc.memory import Footprint
from hessfunc.randomness import _words
from hessfunc.selection import merge
from hessfunc.spaces.of import space_of
from hessfunc.trees import leaves
from tests.cases import TiedHead


def some_tree() -> dict[str, Any]:
    """A nested tree whose keys are not in alphabetical order."""
    return {
        "z": torch.arange(6.0).reshape(2, 3),
        "a": {"y": torch.tensor(6.0), "b": [torch.arange(7.0, 9.0), torch.zeros(0, 3)]},
        "m": (torch.tensor([9.0]),),
    }


# Ravel and unravel


def test_flat_order_is_that_of_parameters_to_vector() -> None:
    model = nn.ModuleDict({"z": nn.Linear(3, 2), "a": nn.Conv2d(1, 2, 2), "tied": TiedHead()})
    _, params = hf.functional(model)
    assert torch.equal(hf.ravel(params), nn.utils.parameters_to_vector(model.parameters()).detach())


def test_ravel_keeps_the_order_of_keys() -> None:
    assert hf.ravel(some_tree()).tolist() == list(range(10))


shapes = st.lists(st.integers(0, 3), max_size=3)
trees = st.recursive(
    shapes,
    lambda inner: (
        st.lists(inner.map(lambda x: ("node", x)), min_size=1, max_size=3)
        | st.dictionaries(st.text("abz", min_size=1), inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def with_tensors(shaped: Any, k: int | None = None) -> Any:
    """The tree of zeros with these shapes, or a block of k."""
    if isinstance(shaped, dict):
        return {key: with_tensors(value, k) for key, value in shaped.items()}
    if isinstance(shaped, list) and shaped and isinstance(shaped[0], tuple):
        return [with_tensors(value, k) for _, value in shaped]
    return torch.zeros([*([] if k is None else [k]), *shaped])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(shaped=trees, k=st.integers(0, 3))
def test_unravel_undoes_ravel_on_any_tree(shaped: Any, k: int) -> None:
    like = with_tensors(shaped)
    space = space_of(like)
    flat, rows = torch.randn(space.n), torch.randn(k, space.n)
    assert torch.equal(hf.ravel(hf.unravel(flat, like)), flat)
    block = hf.unravel(rows, like)
    assert _pytree.tree_structure(block) == _pytree.tree_structure(like)
    assert [x.shape for x in leaves(block)] == [x.shape for x in leaves(with_tensors(shaped, k))]
    assert torch.equal(space.ravel(block), rows)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Registered:
    """A container that torch's own registry knows."""

    def __init__(self, *found: Tensor) -> None:
        self.found = found


_pytree.register_pytree_node(
    Registered, lambda node: (list(node.found), None), lambda found, _: Registered(*found)
)


@pytest.mark.parametrize(
    "like",
    [
        Pair(torch.zeros(2), torch.zeros(3)),
        OrderedDict(z=torch.zeros(2), a=torch.zeros(3)),
        Registered(torch.zeros(2), torch.zeros(3)),
        [torch.zeros(2), (torch.zeros(3),)],
    ],
    ids=lambda like: type(like).__name__,
)
def test_containers_that_torch_knows_are_trees(like: Any) -> None:
    flat = torch.arange(5.0)
    again = hf.unravel(flat, like)
    assert type(again) is type(like)
    assert torch.equal(hf.ravel(again), flat)


def test_a_bare_tensor_is_a_tree() -> None:
    assert hf.unravel(torch.arange(6.0), torch.zeros(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("rows", [torch.arange(10.0), torch.arange(30.0).reshape(3, 10)])
def test_trees_and_blocks_are_views_of_flat_rows(rows: Tensor) -> None:
    views = leaves(hf.unravel(rows, some_tree()))
    starts = [0, 6, 7, 9, 9]
    for view, start in zip(views, starts, strict=True):
        assert view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        assert view.storage_offset() == start


def test_leaves_of_another_dtype_are_converted_and_rows_promoted() -> None:
    like = {"half": torch.zeros(2, dtype=torch.bfloat16), "double": torch.zeros(1).double()}
    assert hf.ravel(like).dtype == torch.float64
    tree = hf.unravel(torch.arange(3.0), like)
    assert (tree["half"].dtype, tree["double"].dtype) == (torch.bfloat16, torch.float64)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": torch.zeros(2, dtype=torch.int64)}, TypeError, "'a' has dtype torch.int64"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, TypeError, "real floating-point"),
        ({"a": {"b": 1.0}}, TypeError, "'a.b' is a float, not a tensor"),
        ({}, ValueError, "no leaf: check that not all parameters"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")},
            ValueError,
            r"several devices, \['cpu', 'meta'\]",
        ),
    ],
)
def test_what_is_not_a_vector_is_refused(tree: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        space_of(tree)


@pytest.mark.parametrize("shape", [(9,), (2, 11), (2, 1, 10), ()])
def test_flat_rows_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass one of shape \(10,\) or \(k, 10\)"):
        hf.unravel(torch.zeros(shape), some_tree())


LIKE = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"w": torch.zeros(4, 2, 3)}, r"structure of the parameters, 2 leaves \(w, b\)"),
        ({**LIKE, "c": torch.zeros(2)}, "structure of the parameters"),
        ([torch.zeros(4, 2, 3), torch.zeros(4, 2)], "structure of the parameters"),
        ({"w": torch.zeros(4, 2, 3), "b": 0.0}, "its leaf 'b' is a float, not a tensor"),
        ({"w": torch.zeros(4, 2, 3), "b": {"b": torch.zeros(4, 2)}}, "its leaf 'b' is a dict"),
        (LIKE, r"'w' has the shape of one vector, \(2, 3\).*use `apply\(matvec, vector\)`"),
        (
            {"w": torch.zeros(4, 3, 2), "b": torch.zeros(4, 2)},
            r"'w' of the block has shape \(4, 3, 2\), expected \(k, 2, 3\)",
        ),
        (
            {"w": torch.zeros(4, 2, 3), "b": torch.zeros(5, 2)},
            "differ in the length of their probe axis: w has 4, b has 5",
        ),
        (
            {"w": torch.zeros(4, 2, 3), "b": torch.zeros(4, 2, device="meta")},
            "'b' of the block is on meta, expected cpu",
        ),
    ],
)
def test_what_is_not_a_block_of_the_space_is_refused(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_of(LIKE).block_leaves(block)


def test_a_vector_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'b' of the vector has shape \(3,\), expected \(2\)"):
        space_of(LIKE).tree_leaves({"w": torch.zeros(2, 3), "b": torch.zeros(3)})


def test_a_vector_is_matched_by_name_whatever_the_order_of_its_keys() -> None:
    w, b = torch.rand(2, 3), torch.rand(2)
    found = space_of(LIKE).tree_leaves({"b": b, "w": w})
    assert found[0] is w
    assert found[1] is b


# Scalars and combinations


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(torch.randn, id="normal"),
        pytest.param(torch.rand, id="positive"),
        pytest.param(lambda n, generator: torch.full((n,), 0.1), id="constant"),
    ],
)
def test_float32_inner_products_of_ten_million_entries_are_accurate(entries: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (entries(10_000_000, generator=generator) for _ in range(2))
    space, expected = space_of(x), x.double() @ y.double()
    bound = 1e-7 * x.double().norm() * y.double().norm()
    assert abs(space.by_leaf(x[None], y[None]).item() - expected) < bound
    # Torch's own norm of so many equal entries is off by 2e-11; NumPy sums pairwise.
    length = float(x.double().square().numpy().sum()) ** 0.5
    assert space.norms(x[None]).item() == pytest.approx(length, rel=1e-12)
    assert abs(space.gram(x[None], y[None]).item() - expected) < bound


@pytest.mark.parametrize("entries", [torch.randn, torch.rand], ids=["normal", "positive"])
def test_many_float32_inner_products_are_as_accurate(entries: Any) -> None:
    x, y = entries(6, 1_000_000), entries(5, 1_000_000)
    error = (space_of(x[0]).gram(x, y) - x.double() @ y.double().mT).abs()
    assert (error < 1e-8 * x.norm(dim=1, keepdim=True) * y.norm(dim=1)).all()


@pytest.mark.parametrize("n", [1, 1000, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("j", "k"), [(3, 2), (6, 5)], ids=["few", "many"])
def test_gram_is_the_matrix_of_inner_products(j: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(j, n, dtype=dtype), torch.randn(k, n, dtype=dtype)
    gram = space_of(x[0]).gram(x, y)
    assert gram.dtype == torch.float64
    error = (gram - x.double() @ y.double().mT).abs()
    assert (error < 1e-7 * x.norm(dim=1, keepdim=True) * y.norm(dim=1)).all()


def test_combine_and_by_leaf() -> None:
    space = space_of(LIKE)
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    coefficients = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(space.combine(coefficients, x), coefficients.float() @ x)
    expected = torch.stack([(x * y)[:, :6].sum(1), (x * y)[:, 6:].sum(1)], dim=1)
    torch.testing.assert_close(space.by_leaf(x, y), expected.double(), rtol=1e-5, atol=1e-6)


def test_columns_are_named_by_their_leaf() -> None:
    space = space_of(some_tree())
    assert space.leaf_of_columns(torch.tensor([0, 5])) == ["z"]
    assert space.leaf_of_columns(torch.tensor([8, 6, 9])) == ["a.y", "a.b.0", "m.0"]


# Probes


KINDS = ("signs", "normal", "sphere")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_blocks_of_probes_equal_the_whole(kind: Any) -> None:
    like = {"a": torch.zeros(70), "b": torch.zeros(3, 5)}
    whole = hf.random_like(like, 5, kind=kind, seed=3)
    parts = [hf.random_like(like, k, kind=kind, seed=3, start=s) for k, s in ((2, 0), (3, 2))]
    for name in like:
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


def test_a_leafs_entries_do_not_depend_on_other_leaves() -> None:
    short = hf.random_like({"a": torch.zeros(9), "b": torch.zeros(2)}, 2, seed=0)
    long = hf.random_like({"a": torch.zeros(4), "b": torch.zeros(80)}, 2, seed=0)
    assert torch.equal(short["a"][:, :4], long["a"])
    assert torch.equal(short["b"], long["b"][:, :2])


class Calls(TorchDispatchMode):
    """Counts the operations inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_many_small_leaves_are_drawn_at_once(kind: Any) -> None:
    like = {f"w{i}": torch.zeros(i % 7) for i in range(1000)}
    space = space_of(like)
    with Calls() as calls:
        rows = space.probes(range(8), kind=kind, seed=0)
    assert calls.count < 100
    alone = hf.random_like({f"w{i}": torch.zeros(7) for i in range(1000)}, 8, kind=kind, seed=0)
    for i, part in enumerate(rows.split([i % 7 for i in range(1000)], dim=1)):
        assert torch.equal(part, alone[f"w{i}"][:, : i % 7])


@pytest.mark.parametrize("kind", KINDS)
def test_probes_take_no_memory_beside_themselves(kind: Any) -> None:
    space = space_of({"a": torch.zeros(1_500_000), "b": torch.zeros(500_000)})
    with Footprint() as memory:
        rows = space.probes(range(2), kind=kind, seed=0)
    assert memory.peak <= 1.1 * rows.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_probes_neither_read_nor_move_torchs_random_stream(kind: Any) -> None:
    first = hf.random_like(torch.zeros(10), 2, kind=kind, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        state = torch.get_rng_state()
        assert torch.equal(hf.random_like(torch.zeros(10), 2, kind=kind, seed=1), first)
        assert torch.equal(torch.get_rng_state(), state)


def test_probes_are_the_same_in_every_dtype() -> None:
    single = hf.random_like(torch.zeros(50), 2, kind="normal", seed=1)
    double = hf.random_like(torch.zeros(50).double(), 2, kind="normal", seed=1)
    assert torch.equal(single, double.float())


def test_words_are_those_of_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    found = _words(0, range(4), torch.device("cpu")).tolist()
    assert [word % 2**64 for word in found] == published


def test_probes_stay_the_same_in_every_version() -> None:
    signs = hf.random_like(torch.zeros(12), 1, seed=0)[0].tolist()
    assert signs == [-1, -1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1]
    normals = hf.random_like(torch.zeros(3).double(), 1, kind="normal", seed=0)[0].tolist()
    assert normals == pytest.approx([-1.0057519641895665, -1.7533864705249171, -2.4201613655781236])


N = 100_000


def test_signs_are_balanced() -> None:
    signs = hf.random_like(torch.zeros(N), 4, seed=0)
    assert signs.abs().eq(1).all()
    assert signs.sum(1).abs().max() < 5 * N**0.5


def test_normals_are_normal() -> None:
    normals = hf.random_like(torch.zeros(N).double(), 2, kind="normal", seed=0)
    for row in normals:
        assert kstest(row.numpy(), "norm").pvalue > 1e-3
        assert row.mean().abs() < 5 / N**0.5
        assert (row.var() - 1).abs() < 5 * (2 / N) ** 0.5
        assert (row.pow(4).mean() - 3).abs() < 5 * (96 / N) ** 0.5


def test_sphere_probes_have_radius_sqrt_n_over_all_leaves() -> None:
    like = {"a": torch.zeros(60).double(), "b": torch.zeros(2, 5).double()}
    rows = space_of(like).ravel(hf.random_like(like, 3, kind="sphere", seed=0))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((3,), 70.0).double().sqrt())


def rows_of(kind: Any, *, seed: int, start: int = 0, leaf: str = "a") -> Tensor:
    """One probe, restricted to one of two equal leaves."""
    like = {"a": torch.zeros(N).double(), "b": torch.zeros(N).double()}
    return hf.random_like(like, 1, kind=kind, seed=seed, start=start)[leaf][0]


@pytest.mark.parametrize("kind", ["signs", "normal"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 0}, {"seed": 2**40}),
        ({"seed": 0}, {"seed": -1}),
        ({"seed": 0}, {"seed": 0, "start": 1}),
        ({"seed": 0, "start": 1}, {"seed": 1, "start": 0}),
        ({"seed": 0}, {"seed": 0, "leaf": "b"}),
        ({"seed": 0, "start": 1}, {"seed": 0, "leaf": "b"}),
    ],
)
def test_different_probes_are_uncorrelated(
    kind: Any, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert abs(rows_of(kind, **one) @ rows_of(kind, **other)) < 5 * N**0.5


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_entries_of_one_probe_are_uncorrelated(kind: Any) -> None:
    row = rows_of(kind, seed=0)
    correlations = torch.stack([row[lag:] @ row[:-lag] for lag in range(1, 200)])
    assert correlations.abs().max() < 5 * N**0.5
    assert (row[::2].square() - 1) @ (row[1::2].square() - 1) < 5 * (4 * N / 2) ** 0.5


def test_probes_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='gauss': choose 'signs', 'normal' or 'sphere'"):
        hf.random_like(torch.zeros(3), 1, kind="gauss", seed=0)  # type: ignore[arg-type]


# Split


PARAMS = {name: torch.zeros(i) for i, name in enumerate(("l1.w", "l1.b", "l2.w", "l2.b", "head"))}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("l1.*", ["l1.w", "l1.b"]),
        ("*.w", ["l1.w", "l2.w"]),
        ("l?.b", ["l1.b", "l2.b"]),
        ("head", ["head"]),
        (["head", "l1.w"], ["l1.w", "head"]),
        (["head", "l1.*"], ["l1.w", "l1.b", "head"]),
        ((name for name in ("head",)), ["head"]),
        (lambda name, tensor: "l" in name and len(tensor) > 1, ["l2.w", "l2.b"]),
    ],
)
def test_split_chooses_by_glob_names_or_predicate(pattern: Any, expected: list[str]) -> None:
    chosen, rest = hf.split(PARAMS, pattern)
    assert list(chosen) == expected
    assert list(rest) == [name for name in PARAMS if name not in expected]
    assert all(chosen[name] is PARAMS[name] for name in chosen)


def test_a_name_with_brackets_is_found_by_itself() -> None:
    tree = {"w[0]": torch.zeros(1), "w0": torch.zeros(1)}
    assert list(hf.split(tree, ["w[0]"])[0]) == ["w[0]"]


def test_split_sees_nested_mappings_by_dotted_names() -> None:
    tree = {"l1": {"w": torch.zeros(1), "b": torch.zeros(2)}, "l2": {"w": torch.zeros(3)}}
    chosen, rest = hf.split(tree, "*.w")
    assert chosen == {"l1": {"w": tree["l1"]["w"]}, "l2": {"w": tree["l2"]["w"]}}
    assert rest == {"l1": {"b": tree["l1"]["b"]}}


@pytest.mark.parametrize("pattern", ["l1.*", "*.b"])
def test_merge_undoes_split(pattern: str) -> None:
    tree = {"l1": {"w": torch.zeros(1), "b": torch.zeros(2)}, "l2": {"b": torch.zeros(3)}}
    before = copy.deepcopy(tree)
    whole = merge(*hf.split(tree, pattern))
    assert {k: set(v) for k, v in whole.items()} == {k: set(v) for k, v in before.items()}
    assert all(whole[k][name] is tree[k][name] for k in tree for name in tree[k])


@pytest.mark.parametrize(
    ("tree", "pattern", "error", "message"),
    [
        (PARAMS, "layer3.*", ValueError, "'layer3.*' chooses none of the leaves l1.w, .*, head$"),
        (PARAMS, ["head", "tail"], ValueError, "there is no leaf named tail among l1.w"),
        (PARAMS, ["l1.*", "l3.*"], ValueError, r"there is no leaf named l3\.\* among l1.w"),
        ({str(i): torch.zeros(1) for i in range(9)}, "x", ValueError, r", 7, \.\.\.$"),
        (PARAMS, lambda *_: False, ValueError, "chooses none of the leaves"),
        ({"a": [torch.zeros(1)]}, "a", TypeError, "'a' is a list"),
    ],
)
def test_a_split_that_cannot_be_meant_is_refused(
    tree: Any, pattern: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hf.split(tree, pattern)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_lengths_of_rows_take_the_memory_of_one() -> None:
    rows = torch.ones(20, 2_000_000)
    space = space_of(torch.zeros(2_000_000))
    space.norms(rows)
    # Pages that the system counts late are of a first call alone.
    assert min(peak_above(lambda: space.norms(rows)) for _ in range(3)) < 3 * rows[0].nbytes
