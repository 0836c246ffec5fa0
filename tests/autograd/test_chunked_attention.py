"""Attention in chunks of queries, against attention with all weights."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.autograd import chunked_attention
from hessfunc.autograd.attention import math_attention
from hessfunc.autograd.chunked_attention import attention
from tests.cases import waves
from tests.graphs import allocated
from tests.reference import gauss_newton, hessian, matrix, relative_error

HIDDEN = waves(2, 1, 7, 7) > 0.2
# Shapes of queries and keys, and options.
KINDS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (7, 7, {}),
    "causal": (7, 7, {"is_causal": True}),
    "more keys": (5, 8, {}),
    "causal, more keys": (5, 8, {"is_causal": True}),
    "causal, more queries": (8, 5, {"is_causal": True}),
    "hidden pairs": (7, 7, {"attn_mask": HIDDEN}),
    "padding": (7, 7, {"attn_mask": waves(2, 1, 1, 7) > -0.5}),
    "bias": (7, 7, {"attn_mask": waves(7, 7)}),
    "bias of queries": (7, 7, {"attn_mask": waves(7, 1)}),
    "bias of keys": (7, 7, {"attn_mask": waves(7)}),
    "scale": (7, 7, {"scale": 0.3}),
    "grouped": (7, 7, {"enable_gqa": True}),
    "no key": (7, 7, {"attn_mask": torch.arange(7)[:, None].expand(7, 7) != 3}),
}


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of all sizes in chunks of three queries."""
    monkeypatch.setattr(chunked_attention, "_SHORT", 0)
    monkeypatch.setattr(chunked_attention, "_ENTRIES", 1)
    monkeypatch.setattr(chunked_attention, "_FEWEST", 3)


def inputs(kind: str) -> list[Tensor]:
    queries, keys, options = KINDS[kind]
    heads = 1 if options.get("enable_gqa") else 2
    return [waves(2, 2, queries, 3), 1.5 * waves(2, heads, keys, 3), waves(2, heads, keys, 4)]


def derivatives(attend: Callable[..., Tensor], kind: str) -> list[Tensor]:
    """Values and derivatives up to the third, of single cotangents and of blocks."""
    point = [x.clone().requires_grad_() for x in inputs(kind)]
    out = attend(*point, **KINDS[kind][2])
    cotangent, tangents = waves(*out.shape), [waves(*x.shape) for x in point]
    first = grad((out.sin() * cotangent).sum(), point, create_graph=True)
    second = grad(first, point, tangents, create_graph=True)
    third = grad(second, point, tangents, retain_graph=True)
    block = [torch.stack([t, 2 * t * t]) for t in tangents]
    blocks = torch.vmap(lambda *t: grad(first, point, t, retain_graph=True))(*block)
    zero = torch.zeros_like(out).requires_grad_()
    transposed = grad(out, point, zero, create_graph=True)
    forward = grad(transposed, zero, tangents, retain_graph=True)
    pulled = torch.vmap(lambda g: grad(out, point, g, retain_graph=True))(
        torch.stack([cotangent, cotangent**2])
    )
    return [out, *first, *second, *third, *blocks, *forward, *pulled]


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_all_weights(kind: str) -> None:
    found, due = derivatives(attention, kind), derivatives(math_attention, kind)
    for x, y in zip(found, due, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", range(3))
def test_a_constant_argument_gets_no_gradient(frozen: int) -> None:
    results = []
    for attend in (attention, math_attention):
        point = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(inputs("causal"))]
        moving = [x for x in point if x.requires_grad]
        first = grad(attend(*point, is_causal=True).sin().sum(), moving, create_graph=True)
        results.append(grad(first, moving, [waves(*x.shape) for x in moving]))
    for x, y in zip(*results, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 2)).movedim(-3, 0).transpose(-3, -2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(-3, -2).flatten(-2)).mean(1)


@pytest.mark.parametrize("recompute", [None, "0"])
@pytest.mark.parametrize("chunk_size", [1, 64])
def test_products_of_a_model(chunk_size: int, recompute: str | None) -> None:
    torch.manual_seed(0)
    model_fn, params = hf.functional(nn.Sequential(Block()).double(), recompute=recompute)
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = waves(2, 7, 4), torch.tensor([0, 2])
    exact = hessian(loss, params, batch)
    for mode in ("reverse", "forward"):
        product = hf.hvp(loss, mode=mode, chunk_size=chunk_size)(params, batch)  # type: ignore[arg-type]
        assert relative_error(matrix(product, params), exact) < 1e-10
    found = matrix(hf.ggnvp(loss, chunk_size=chunk_size)(params, batch), params)
    assert relative_error(found, gauss_newton(loss, params, batch)) < 1e-10


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("of", ["jvp of jvp", "hessian", "vmap"])
def test_transforms_inside_of_a_loss(of: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, direction = waves(1, 7, 2), waves(1, 7, 2).square()
    p = {name: waves(2, 2) * (i + 1) for i, name in enumerate("qkv")}
    v = {name: leaf.sin() for name, leaf in p.items()}

    def loss(p: Any, x: Tensor) -> Tensor:
        def net(y: Tensor) -> Tensor:
            parts = (y @ p[name] for name in "qkv")
            return F.scaled_dot_product_attention(*parts, is_causal=True)

        if of == "jvp of jvp":
            once = lambda y: torch.func.jvp(net, (y,), (direction,))[1]  # noqa: E731
            return net(x).square().sum() + torch.func.jvp(once, (x,), (direction,))[1].sum()
        if of == "hessian":
            return torch.func.hessian(lambda y: net(y).sin().sum())(x).square().sum()
        each = torch.vmap(torch.func.grad(lambda y: net(y[None]).sin().sum()))(
            torch.cat([x, 2 * x])
        )
        return each.square().sum()

    found = hf.apply(hf.hvp(loss, mode=mode)(p, x), v)
    monkeypatch.setattr(chunked_attention, "_SHORT", 10**9)
    due = hf.apply(hf.hvp(loss, mode=mode)(p, x), v)
    for name, leaf in due.items():
        assert relative_error(found[name], leaf) < 1e-8


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.5}, {"attn_mask": waves(7, 7).requires_grad_()}]
)
def test_random_masks_and_learned_biases_keep_all_weights(options: dict[str, Any]) -> None:
    point = [x.clone().requires_grad_() for x in inputs("plain")]
    assert "_OutputsBackward" in str(attention(*point).grad_fn)
    assert "_OutputsBackward" not in str(attention(*point, **options).grad_fn)


def test_broadcast_batches_keep_all_weights() -> None:
    q, k, v = inputs("plain")
    alone = k[:1].clone().requires_grad_()
    found, due = attention(q, alone, v), math_attention(q, alone, v)
    assert torch.allclose(found, due)


def test_narrow_numbers_have_a_wide_softmax() -> None:
    point = [x.bfloat16() for x in inputs("causal")]
    found = attention(*point, is_causal=True)
    due = math_attention(*(x.float() for x in point), is_causal=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, due.bfloat16())


def test_a_causal_mask_beside_another_mask_is_an_error_of_torch() -> None:
    with pytest.raises(RuntimeError, match="is_causal"):
        attention(*inputs("plain"), attn_mask=waves(7, 7), is_causal=True)


def test_short_sequences_keep_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    short, long = (torch.zeros(1, n, 2, requires_grad=True) for n in (512, 520))
    assert "_OutputsBackward" not in str(attention(short, short, short).grad_fn)
    assert "_OutputsBackward" in str(attention(long, long, long).grad_fn)


def test_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        x = torch.randn(1, length, 4)

        def product() -> Any:
            loss = hf.composed(
                lambda p, _: F.scaled_dot_product_attention(p * x, p * x, x, is_causal=True),
                lambda out, _: out.square().mean(),
            )
            p = torch.ones(4)
            return hf.hvp(loss)(p, None)(p[None])

        return allocated(product).peak

    assert peak(400) < 2.5 * peak(200)
    assert math.isfinite(peak(3))
