from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.memory import Footprint
from hessfunc.spaces.of import space_of
from hessfunc.transforms import chunks as blocks
from hessfunc.transforms.chunks import Chunks, Product, block_matvec
from hessfunc.trees import Matvec
from tests.cases import NAMES, NO_FORWARD_MODE, case
from tests.graphs import allocated
from tests.reference import random_symmetric, relative_error, rows

N = 6
A = random_symmetric(N)


def matvec_of(product: Product, *, chunks: Chunks) -> Matvec:
    """The matvec of a product of vectors of n entries."""
    point = torch.zeros(N, dtype=torch.float64)
    return block_matvec(product, space_of(point), [point], None, chunks=chunks)


def times_A(tangents: Sequence[Tensor]) -> list[Tensor]:
    """A v."""
    return [A @ tangents[0]]


def block(k: int) -> Tensor:
    """k vectors."""
    return torch.randn(k, N, dtype=torch.float64)


# A block agrees with its vectors, however it is cut


@cache
def single_products(name: str, mode: Any) -> Tensor:
    """The products of eight vectors, one by one."""
    found = case(name)
    matvec = hf.hvp(found.loss, mode=mode)(found.params, found.batch)
    v = hf.random_like(found.params, 8, seed=0)
    singles = ({n: leaf[i] for n, leaf in v.items()} for i in range(8))
    return torch.stack([hf.ravel(hf.apply(matvec, one)) for one in singles])


@pytest.mark.parametrize("chunk_size", [3, 100, None])
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "reverse") for name in NAMES]
    + [(name, "forward") for name in NAMES if name not in NO_FORWARD_MODE],
)
def test_blocks_agree_with_single_products(name: str, mode: Any, chunk_size: Any) -> None:
    found = case(name)
    matvec = hf.hvp(found.loss, mode=mode, chunk_size=chunk_size)(found.params, found.batch)
    v = hf.random_like(found.params, 8, seed=0)
    assert relative_error(rows(matvec(v)), single_products(name, mode)) < 1e-10


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("k", [0, 1, 2, 9])
def test_any_number_of_vectors_is_a_block(k: int, chunk_size: Any) -> None:
    v = block(k)
    out = matvec_of(times_A, chunks=Chunks(chunk_size))(v)
    torch.testing.assert_close(out, v @ A)


@pytest.mark.parametrize(("chunk_size", "calls"), [(1, 8), (3, 3), (4, 2), (8, 1), (20, 1)])
def test_a_chunk_goes_through_one_call(chunk_size: int, calls: int) -> None:
    seen = []

    def product(tangents: Sequence[Tensor]) -> list[Tensor]:
        seen.append(tangents)
        return times_A(tangents)

    matvec_of(product, chunks=Chunks(chunk_size))(block(8))
    assert len(seen) == calls


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_products_are_in_the_dtype_of_the_parameters(chunk_size: Any) -> None:
    model_fn, params = hf.functional(nn.Linear(3, 2))
    loss = hf.supervised(model_fn, F.cross_entropy)
    matvec = hf.hvp(loss, chunk_size=chunk_size)(
        params, (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    )
    v = {name: torch.ones(5, *leaf.shape, dtype=torch.float64) for name, leaf in params.items()}
    assert {leaf.dtype for leaf in matvec(v).values()} == {torch.float32}


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_products_carry_the_graph_of_the_block_alone(chunk_size: Any) -> None:
    scale = torch.full((N,), 3.0, dtype=torch.float64, requires_grad=True)
    matvec = matvec_of(lambda tangents: [scale * tangents[0]], chunks=Chunks(chunk_size))
    assert not matvec(block(6)).requires_grad
    vectors, others = block(6).requires_grad_(), block(6) + 1
    torch.autograd.backward((matvec(vectors) * others).sum())
    torch.testing.assert_close(vectors.grad, 3 * others)
    assert scale.grad is None


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, "fast", "auto"])
def test_a_chunk_size_that_is_no_number_is_refused(chunk_size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="chunk_size"):
        hf.hvp(lambda p, _: p.sum(), chunk_size=chunk_size)


# Auto


def test_auto_keeps_what_the_rule_gave() -> None:
    calls = []

    def product(tangents: Sequence[Tensor]) -> list[Tensor]:
        calls.append(tangents)
        return times_A(tangents)

    chunks = Chunks()
    matvec = matvec_of(product, chunks=chunks)
    matvec(block(16))
    (chosen,) = chunks.chosen.values()
    calls.clear()
    matvec(block(16))
    assert len(calls) == -(-16 // chosen)


def test_auto_chooses_anew_for_other_parameters_and_batches() -> None:
    chunks = Chunks()
    for n, length in ((N, 1), (2 * N, 1), (N, 2)):
        point, batch = torch.zeros(n), torch.zeros(length)
        matvec = block_matvec(list, space_of(point), [point], batch, chunks=chunks)
        matvec(torch.ones(8, n))
    assert len(chunks.chosen) == 3


def test_auto_loops_where_vmap_is_not_possible() -> None:
    def product(tangents: Sequence[Tensor]) -> list[Tensor]:
        assert tangents[0].sum().item() is not None
        return times_A(tangents)

    chunks, v = Chunks(), block(8)
    torch.testing.assert_close(matvec_of(product, chunks=chunks)(v), v @ A)
    assert list(chunks.chosen.values()) == [1]


def needs(size: int) -> Product:
    """A product that makes a temporary of ``size`` entries a vector."""

    def product(tangents: Sequence[Tensor]) -> list[Tensor]:
        wide = tangents[0].sum() * torch.ones(size, dtype=torch.float64)
        return [times_A(tangents)[0] + 0 * wide.sum()]

    return product


def test_small_operations_go_through_vmap_and_large_ones_through_a_loop() -> None:
    small, large = Chunks(), Chunks()
    for chunks, size in ((small, 1000), (large, 200_000)):
        v = block(16)
        torch.testing.assert_close(matvec_of(needs(size), chunks=chunks)(v), v @ A)
    assert list(small.chosen.values()) == [16]
    assert list(large.chosen.values()) == [1]


def test_gauss_newton_products_take_vmap_for_larger_operations() -> None:
    at = {}
    for entries in (2**15, 2**16):
        chunks = Chunks(entries=entries)
        matvec_of(needs(150_000), chunks=chunks)(block(8))
        (at[entries],) = chunks.chosen.values()
    assert at == {2**15: 1, 2**16: 8}


def test_a_chunk_takes_no_more_than_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CHUNK_BYTES", 5 * 2 * 8 * 10_000)
    chunks, v = Chunks(), block(16)
    torch.testing.assert_close(matvec_of(needs(10_000), chunks=chunks)(v), v @ A)
    # Five would fit, but four passes of four are as many.
    assert list(chunks.chosen.values()) == [4]


def test_auto_keeps_tensors_small_enough_for_memory_to_be_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "_LARGEST_ON_CPU", 8 * 8 * 1000)
    chunks, v = Chunks(), block(24)
    torch.testing.assert_close(matvec_of(needs(1000), chunks=chunks)(v), v @ A)
    assert list(chunks.chosen.values()) == [8]


def test_the_rule_wastes_no_product_where_a_loop_is_taken() -> None:
    counted = []

    def product(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        counted.append(tangents)
        return needs(200_000)(tangents)

    chunks, v = Chunks(), block(16)
    torch.testing.assert_close(matvec_of(product, chunks=chunks)(v), v @ A)
    assert list(chunks.chosen.values()) == [1]
    assert len(counted) == 16


def test_auto_loops_where_one_vector_hardly_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CHUNK_BYTES", 1)
    chunks, v = Chunks(), block(16)
    torch.testing.assert_close(matvec_of(needs(1000), chunks=chunks)(v), v @ A)
    assert list(chunks.chosen.values()) == [1]


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_block_has_the_same_bits_each_time(name: str) -> None:
    # The first call measures a product; the bits of the block must not show it.
    found = case(name)
    v = hf.random_like(found.params, 8, seed=0)
    matvec = hf.hvp(found.loss)(found.params, found.batch)
    first, second = rows(matvec(v)), rows(matvec(v))
    fresh = rows(hf.hvp(found.loss)(found.params, found.batch)(v))
    assert torch.equal(first, second)
    assert torch.equal(first, fresh)


# Memory


def out_of_memory_above(limit: int) -> tuple[Product, list[int]]:
    """A product that runs out of memory above a number of vectors, and what it was asked for."""
    asked: list[int] = []

    def product(tangents: Sequence[Tensor]) -> list[Tensor]:
        (v,) = tangents
        while torch._C._functorch.is_batchedtensor(v):
            v = torch._C._functorch.get_unwrapped(v)
        asked.append(len(v) if v.dim() > 1 else 1)
        if asked[-1] > limit:
            raise torch.OutOfMemoryError
        return times_A(tangents)

    return product, asked


def test_out_of_memory_halves_the_chunk_and_goes_on() -> None:
    product, asked = out_of_memory_above(3)
    v = block(12)
    torch.testing.assert_close(matvec_of(product, chunks=Chunks(12))(v), v @ A)
    assert asked == [12, 6, 3, 3, 3, 3]


def test_out_of_memory_with_one_vector_is_raised() -> None:
    product, asked = out_of_memory_above(0)
    with pytest.raises(torch.OutOfMemoryError):
        matvec_of(product, chunks=Chunks(5))(block(5))
    assert asked == [5, 2, 1]


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 10)), (64, 100)),
        (
            nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 10)
            ),
            (16, 3, 16, 16),
        ),
        (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU()), (32, 20, 64)),
    ],
    ids=["mlp", "conv", "layer norm"],
)
def test_the_predicted_memory_of_a_block_is_within_a_factor_of_two(
    model: nn.Module, inputs: tuple[int, ...], k: int
) -> None:
    model_fn, params = hf.functional(model)
    loss = hf.composed(model_fn, lambda out, _: out.logsumexp(-1).mean())
    matvec = hf.hvp(loss, chunk_size=k)(params, torch.randn(inputs))
    v = hf.random_like(params, k, seed=0)
    one = hf.random_like(params, 1, seed=0)
    matvec(v)
    with Footprint() as memory:
        matvec(one)
    assert 0.5 < k * memory.peak / allocated(lambda: matvec(v)).peak < 2


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    with Footprint() as memory:
        for _ in range(10):
            x = torch.ones(1000, dtype=torch.float64)
            y = x + 1
            view = y[:10]
            del x, y, view
    assert memory.peak == 2 * 8 * 1000
    assert memory.now == 0


def test_peak_memory_does_not_count_what_was_there_before() -> None:
    x = torch.ones(1000, dtype=torch.float64)
    with Footprint() as memory:
        y = x.view(10, 100).mT
        z = y + 1
    assert memory.peak == memory.largest == 8 * 1000
    del z
