"""Rows, inner products and probes of the vector space of a tree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from bench.resident import peak_above
from hessfunc.memory import Footprint
from hessfunc.spaces.of import space_of

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
    nested = {"y": torch.zeros(()), "b": [torch.zeros(2), torch.zeros(0, 3)]}
    space = space_of({"z": torch.zeros(2, 3), "a": nested, "m": (torch.zeros(1),)})
    assert space.leaf_of_columns(torch.tensor([0, 5])) == ["z"]
    assert space.leaf_of_columns(torch.tensor([8, 6, 9])) == ["a.y", "a.b.0", "m.0"]


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


def test_sphere_probes_have_radius_sqrt_n_over_all_leaves() -> None:
    like = {"a": torch.zeros(60).double(), "b": torch.zeros(2, 5).double()}
    rows = space_of(like).ravel(hf.random_like(like, 3, kind="sphere", seed=0))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((3,), 70.0).double().sqrt())


def test_probes_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='gauss': choose 'signs', 'normal' or 'sphere'"):
        hf.random_like(torch.zeros(3), 1, kind="gauss", seed=0)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_lengths_of_rows_take_the_memory_of_one() -> None:
    rows = torch.ones(20, 2_000_000)
    space = space_of(torch.zeros(2_000_000))
    space.norms(rows)
    # Pages that the system counts late are of a first call alone.
    assert min(peak_above(lambda: space.norms(rows)) for _ in range(3)) < 3 * rows[0].nbytes
