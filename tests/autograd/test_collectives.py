"""Derivatives of a loss with parameters and rows divided among ranks are those on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

import hessfunc as hf
from hessfunc import ranks as ranks_module
from hessfunc.autograd.collectives import Cut, gathered, joined
from hessfunc.ranks import Ranks
from tests.distributed import problems
from tests.distributed.ranks import Ranks as Processes

# Axes that no number of ranks divides evenly, one shorter than the ranks, and a replicated scalar.
SHAPES = {"in": (5, 7), "bias": (7,), "out": (7, 3), "shift": (3,), "scale": ()}
AXES = (1, 0, 0, 0, None)
ROWS = 6
Wholes = tuple[Tensor, ...]


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def vectors(seed: int, *leading: int) -> Wholes:
    return tuple(numbers(*leading, *s, seed=seed + i) for i, s in enumerate(SHAPES.values()))


def outputs(x: Tensor, *params: Tensor) -> Tensor:
    first, bias, last, shift, scale = params
    return torch.tanh(x @ first + bias) @ last * scale + shift


def value(y: Tensor) -> Tensor:
    return (y.logsumexp(-1) + y.square().sum(-1)).sum()


def cut(ranks: Ranks) -> Cut:
    return Cut(ranks, tuple(map(torch.Size, SHAPES.values())), AXES)


def shards_of(cut: Cut, wholes: Wholes, leading: int = 0) -> Wholes:
    if leading:
        return tuple(
            map(
                torch.stack,
                zip(*(shards_of(cut, w) for w in zip(*wholes, strict=True)), strict=True),
            )
        )
    return tuple(cut.part(i, whole).clone() for i, whole in enumerate(wholes))


def own(ranks: Ranks) -> Tensor:
    x = numbers(ROWS, 5, seed=50)
    part = ranks.parts(ROWS)[ranks.rank]
    return x[part.start : part.stop]


Losses = Callable[..., Tensor]
Derivative = Callable[[Losses, Wholes, Wholes], Sequence[Tensor]]


def gradients(loss: Losses, params: Wholes, _: Wholes) -> Sequence[Tensor]:
    return grad(loss, argnums=tuple(range(len(params))))(*params)


def forward(loss: Losses, params: Wholes, v: Wholes) -> Sequence[Tensor]:
    return jvp(grad(loss, argnums=tuple(range(len(params)))), params, v)[1]


def reverse(loss: Losses, params: Wholes, v: Wholes) -> Sequence[Tensor]:
    inputs = [p.clone().requires_grad_() for p in params]
    first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(first, inputs, v)


def reverse_by_transforms(loss: Losses, params: Wholes, v: Wholes) -> Sequence[Tensor]:
    return vjp(grad(loss, argnums=tuple(range(len(params)))), *params)[1](v)


def third(loss: Losses, params: Wholes, v: Wholes) -> Sequence[Tensor]:
    return jvp(lambda *p: forward(loss, p, v), params, v)[1]


DERIVATIVES: dict[str, Derivative] = {
    "gradient": gradients,
    "forward": forward,
    "reverse": reverse,
    "reverse by transforms": reverse_by_transforms,
    "third": third,
}
LOSSES = ["own rows", "recomputed", "joined"]


def loss_on(name: str, ranks: Ranks) -> Losses:
    def of_whole(*shards: Tensor) -> Tensor:
        return outputs(own(ranks), *gathered(cut(ranks), shards))

    if name == "own rows":
        return lambda *shards: value(of_whole(*shards))
    if name == "recomputed":
        return lambda *shards: value(hf.recomputed(of_whole)(*shards))
    lengths = [len(part) for part in ranks.parts(ROWS)]
    return lambda *shards: value(joined(ranks, lengths, of_whole(*shards)))


def differs_by(name: str, derivative: str, size: int, *, mapped: bool = False) -> float:
    ranks = Ranks.of(problems.mesh(size))
    of, params, v = DERIVATIVES[derivative], vectors(10), vectors(20, *[3] * mapped)
    mine = cut(ranks)
    shards = shards_of(mine, params)

    def here(*vector: Tensor) -> Sequence[Tensor]:
        return of(loss_on(name, ranks), shards, vector)

    def alone(*vector: Tensor) -> Sequence[Tensor]:
        return of(lambda *p: value(outputs(numbers(ROWS, 5, seed=50), *p)), params, vector)

    if mapped:
        found = vmap(here, randomness="same")(*shards_of(mine, v, 1))
        wanted = shards_of(mine, tuple(vmap(alone, randomness="same")(*v)), 1)
    else:
        found, wanted = here(*shards_of(mine, v)), shards_of(mine, tuple(alone(*v)))
    errors = [(a - b).abs().max() for a, b in zip(found, wanted, strict=True) if a.numel()]
    return float(torch.stack(errors).max())


# `recomputed` functions have no third derivative by nested transforms, on one process either.
PAIRS = [(n, d) for n in LOSSES for d in DERIVATIVES if (n, d) != ("recomputed", "third")]


@pytest.mark.parametrize(("name", "derivative"), PAIRS)
def test_derivatives_are_those_of_one_process(name: str, derivative: str, two: Processes) -> None:
    assert max(two.run(differs_by, name, derivative, 2)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_on_four_ranks(name: str, four: Processes) -> None:
    assert max(four.run(differs_by, name, "reverse", 4)) < 1e-11


def mapped_differs_by(name: str, derivative: str) -> float:
    return differs_by(name, derivative, 2, mapped=True)


@pytest.mark.parametrize("derivative", ["forward", "reverse by transforms"])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_by_vmap(name: str, derivative: str, two: Processes) -> None:
    assert max(two.run(mapped_differs_by, name, derivative)) < 1e-11


@contextmanager
def counted(messages: list[int]) -> Iterator[None]:
    """Count the numbers that this rank receives from the others, or sends to them."""

    def counting(collective: Callable[..., None], larger: int) -> Callable[..., None]:
        def call(*tensors: Tensor, **options: object) -> None:
            messages.append(tensors[larger].numel() // 2)
            collective(*tensors, **options)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name, larger in (("_all_gather", 0), ("_reduce_scatter", 1)):
            collective = getattr(ranks_module, name)
            patched.setattr(ranks_module, name, counting(collective, larger))
        yield


def numbers_of_a_product(name: str, derivative: str) -> tuple[int, int]:
    messages: list[int] = []
    ranks = Ranks.of(problems.mesh(2))
    mine = cut(ranks)
    with counted(messages):
        DERIVATIVES[derivative](
            loss_on(name, ranks), shards_of(mine, vectors(10)), shards_of(mine, vectors(20))
        )
    return sum(messages), len(messages)


def test_a_block_of_one_dtype_is_one_message(two: Processes) -> None:
    divided = 5 * 4 + 4 + 4 * 3 + 2  # Of the longer part of each tensor.
    # Of the value and the gradient, and of the vector and the product.
    assert set(two.run(numbers_of_a_product, "own rows", "reverse")) == {(4 * divided, 4)}


def numbers_of_a_block() -> tuple[int, int]:
    ranks, messages = Ranks.of(problems.mesh(2)), list[int]()
    shards = shards_of(cut(ranks), vectors(10))
    block = shards_of(cut(ranks), vectors(20, 3), 1)

    def product(*v: Tensor) -> Sequence[Tensor]:
        return reverse_by_transforms(loss_on("recomputed", ranks), shards, v)

    with counted(messages):
        product(*(leaf[0] for leaf in block))
        of_one = sum(messages)
        vmap(product, randomness="same")(*block)
    return of_one, sum(messages) - of_one


def test_a_block_gathers_the_weights_once(two: Processes) -> None:
    for of_one, of_block in two.run(numbers_of_a_block):
        assert of_block < 0.8 * 3 * of_one


def dtypes_are_kept() -> bool:
    ranks = Ranks.of(problems.mesh(2))
    two = Cut(ranks, (torch.Size([3]), torch.Size([4])), (0, 0))
    wholes = torch.arange(3.0), torch.arange(4.0).bfloat16()
    found = gathered(two, [two.part(i, whole) for i, whole in enumerate(wholes)])
    return all(a.dtype == b.dtype and a.equal(b) for a, b in zip(found, wholes, strict=True))


def test_tensors_of_several_dtypes(two: Processes) -> None:
    assert all(two.run(dtypes_are_kept))
