"""Third derivatives under the transforms of torch.func, against compositions in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.nn import functional as F

from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.transformable import TRANSFORMABLE
from tests.reference import relative_error

Function = Callable[..., Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    # Random functions of torch would raise inside vmap.
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return 1.5 * torch.sin((places + 1) ** 2 * (seed + 1)).view(shape)


def standardised(x: Tensor, axes: Any) -> Tensor:
    mean = x.sum(axes, keepdim=True) / (x.numel() // x.sum(axes).numel())
    variance = ((x - mean) ** 2).sum(axes, keepdim=True) / (x.numel() // x.sum(axes).numel())
    return (x - mean) / (variance + 1e-5).sqrt()


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


CAUSAL = torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)
POSITIONS = drawn(4, 4, seed=5)
MEAN, VARIANCE = drawn(3, seed=8), drawn(3, seed=9).exp()
TARGETS = torch.tensor([0, 2, 1, 2])
WIDE = (4, 3, 5)


def attend(weights_returned: bool) -> Function:
    def attention(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        result, _ = F.multi_head_attention_forward(
            *(x, x, x, 6, 2, w, None, None, None, False, 0.0, out, None),
            need_weights=weights_returned,
        )
        return result

    return attention


def attend_by_parts(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, 3)).permute(1, 2, 0, 3) for part in (x @ w.mT).chunk(3, -1))
    return attended(q, k, v).permute(2, 0, 1, 3).flatten(-2) @ out.mT


# Name: function, its composition, and the shapes of its arguments.
CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, (5,), w, b),
        lambda x, w, b: standardised(x, -1) * w + b,
        [WIDE, (5,), (5,)],
    ),
    "layer_norm over two axes": (
        lambda x: torch.layer_norm(x, (3, 5)),
        lambda x: standardised(x, (-2, -1)),
        [WIDE],
    ),
    "batch_norm in train mode": (
        lambda x, w, b: F.batch_norm(x, MEAN.clone(), VARIANCE.clone(), w, b, training=True),
        lambda x, w, b: standardised(x, (0, 2)) * w[:, None] + b[:, None],
        [WIDE, (3,), (3,)],
    ),
    "batch_norm in eval mode": (
        lambda x, w, b: F.batch_norm(x, MEAN, VARIANCE, w, b),
        lambda x, w, b: (
            (x - MEAN[:, None]) / (VARIANCE[:, None] + 1e-5).sqrt() * w[:, None] + b[:, None]
        ),
        [WIDE, (3,), (3,)],
    ),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        lambda x, w, b: standardised(x, -1) * w[:, None] + b[:, None],
        [WIDE, (3,), (3,)],
    ),
    "group_norm": (
        lambda x, w, b: F.group_norm(x, 2, w, b),
        lambda x, w, b: (
            standardised(x.reshape(3, 2, 10), -1).reshape(3, 4, 5) * w[:, None] + b[:, None]
        ),
        [(3, 4, 5), (4,), (4,)],
    ),
    "rms_norm": (
        lambda x, w: F.rms_norm(x, (5,), w, 1e-5),
        lambda x, w: x / ((x * x).sum(-1, keepdim=True) / 5 + 1e-5).sqrt() * w,
        [WIDE, (5,)],
    ),
    "weight norm": (
        lambda v, g: torch._weight_norm(v, g, 0),
        lambda v, g: v * g / (v * v).sum((1, 2), keepdim=True).sqrt(),
        [WIDE, (4, 1, 1)],
    ),
    "weight norm over all axes": (
        lambda v, g: torch._weight_norm(v, g, -1),
        lambda v, g: v * g / (v * v).sum().sqrt(),
        [WIDE, ()],
    ),
    "attention": (F.scaled_dot_product_attention, attended, [(2, 4, 3)] * 3),
    "causal attention": (
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True),
        lambda *x: attended(*x, mask=CAUSAL),
        [(2, 4, 3)] * 3,
    ),
    "attention with a mask": (
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=CAUSAL == 0),
        lambda *x: attended(*x, mask=CAUSAL),
        [(2, 4, 3)] * 3,
    ),
    "attention with positions": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        attended,
        [(2, 4, 3)] * 3 + [(4, 4)],
    ),
    "multi-head attention": (attend(False), attend_by_parts, [(4, 2, 6), (18, 6), (6, 6)]),
    "multi-head attention with weights": (
        attend(True),
        attend_by_parts,
        [(4, 2, 6), (18, 6), (6, 6)],
    ),
    "gelu": (F.gelu, lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2, [WIDE]),
    "gelu by tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        [WIDE],
    ),
    "silu": (F.silu, lambda x: x / (1 + torch.exp(-x)), [WIDE]),
    "mish": (F.mish, lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), [WIDE]),
    "softplus": (F.softplus, lambda x: torch.log(1 + torch.exp(x)), [WIDE]),
    "log-sigmoid": (F.logsigmoid, lambda x: -torch.log(1 + torch.exp(-x)), [WIDE]),
    "elu": (F.elu, lambda x: torch.where(x > 0, x, torch.exp(x) - 1), [WIDE]),
    "prelu": (
        F.prelu,
        lambda x, a: torch.where(x > 0, x, a[:, None] * x),
        [WIDE, (3,)],
    ),
    "glu": (
        lambda x: F.glu(x, 0),
        lambda x: x[:2] / (1 + torch.exp(-x[2:])),
        [WIDE],
    ),
    "huber_loss": (
        lambda x, y: F.huber_loss(x, y, reduction="none"),
        lambda x, y: torch.where((x - y).abs() < 1, (x - y) ** 2 / 2, (x - y).abs() - 0.5),
        [WIDE, WIDE],
    ),
    "mse_loss": (F.mse_loss, lambda x, y: ((x - y) ** 2).sum() / 60, [WIDE, WIDE]),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, TARGETS),
        lambda x: (x.exp().sum(-1).log() - x[range(4), TARGETS]).sum() / 4,
        [(4, 3)],
    ),
    "binary cross entropy": (
        lambda x: F.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.3)),
        lambda x: (torch.log(1 + torch.exp(x)) - 0.3 * x).sum() / 60,
        [WIDE],
    ),
    "logsumexp": (lambda x: torch.logsumexp(x, -1), lambda x: x.exp().sum(-1).log(), [WIDE]),
    "softmax": (
        lambda x: torch.softmax(x, 1),
        lambda x: x.exp() / x.exp().sum(1, keepdim=True),
        [WIDE],
    ),
    "var": (
        lambda x: torch.var(x, 1),
        lambda x: ((x - x.sum(1, keepdim=True) / 3) ** 2).sum(1) / 2,
        [WIDE],
    ),
    "std": (
        lambda x: torch.std(x, 1),
        lambda x: (((x - x.sum(1, keepdim=True) / 3) ** 2).sum(1) / 2).sqrt(),
        [WIDE],
    ),
    "norm": (lambda x: torch.norm(x, dim=1), lambda x: (x * x).sum(1).sqrt(), [WIDE]),
    "vector_norm": (
        lambda x: torch.linalg.vector_norm(x, 3, dim=1),
        lambda x: (x * x * x.abs()).sum(1) ** (1 / 3),
        [WIDE],
    ),
    "normalize": (
        lambda x: F.normalize(x, dim=1),
        lambda x: x / (x * x).sum(1, keepdim=True).sqrt(),
        [WIDE],
    ),
    "cosine_similarity": (
        lambda x, y: F.cosine_similarity(x, y, dim=1),
        lambda x, y: (x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt(),
        [WIDE, WIDE],
    ),
}


def third(function: Function, replaced: bool) -> Function:
    """Return the map from points to u'H v of a random contraction of a function."""

    def value(*arguments: Tensor) -> Tensor:
        if replaced:
            with Replaced(TRANSFORMABLE):
                out = function(*arguments)
        else:
            out = function(*arguments)
        return (torch.sin(out) * drawn(*out.shape, seed=11)).sum()

    def curved(*arguments: Tensor) -> Tensor:
        places = tuple(range(len(arguments)))
        _, pulled = vjp(grad(value, argnums=places), *arguments)
        product = pulled(tuple(drawn(*x.shape, seed=i) for i, x in enumerate(arguments, 20)))
        pairs = zip(product, arguments, strict=True)
        return sum(
            ((p * drawn(*x.shape, seed=i)).sum() for i, (p, x) in enumerate(pairs, 40)),
            start=torch.zeros((), dtype=torch.float64),
        )

    return curved


def together(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("name", CASES)
def test_third_derivatives_are_those_of_the_composition(name: str) -> None:
    function, composed, shapes = CASES[name]
    point = tuple(drawn(*shape, seed=60 + i) for i, shape in enumerate(shapes))
    places = tuple(range(len(point)))
    curved, expected = third(function, True), third(composed, False)
    gradient = grad(expected, argnums=places)(*point)
    torch.testing.assert_close(curved(*point), expected(*point), rtol=1e-9, atol=1e-9)
    assert relative_error(together(grad(curved, argnums=places)(*point)), together(gradient)) < 1e-8
    directions = tuple(drawn(*x.shape, seed=80 + i) for i, x in enumerate(point))
    along = jvp(curved, point, directions)[1]
    pairs = zip(gradient, directions, strict=True)
    slope = sum(float((g * d).sum()) for g, d in pairs)
    assert float(along) == pytest.approx(slope, rel=1e-8)
    stacked = tuple(torch.stack([x, x + 0.1 * d]) for x, d in zip(point, directions, strict=True))
    mapped = vmap(grad(curved, argnums=places))(*stacked)
    assert relative_error(together([g[0] for g in mapped]), together(gradient)) < 1e-8
    second = tuple(x[1] for x in stacked)
    other = grad(expected, argnums=places)(*second)
    assert relative_error(together([g[1] for g in mapped]), together(other)) < 1e-8


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(5), WIDE),
        (nn.BatchNorm1d(3), WIDE),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), WIDE),
        (nn.InstanceNorm1d(3, affine=True), WIDE),
        (nn.InstanceNorm1d(3, track_running_stats=True).eval(), WIDE),
        (nn.GroupNorm(3, 3), WIDE),
        (nn.RMSNorm(5), WIDE),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_those_of_torch(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = module.to(dtype)
    x = drawn(*shape).to(dtype)
    with Replaced(TRANSFORMABLE):
        found = module(x)
    expected = module(x)
    assert found.dtype == expected.dtype
    # torch rounds the scales and shifts of some norms to bfloat16.
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **close)


def test_statistics_of_a_batch_do_not_change_its_buffers() -> None:
    norm = nn.BatchNorm1d(3)
    with Replaced(TRANSFORMABLE):
        norm(torch.randn(WIDE))
    assert torch.equal(norm.running_mean, torch.zeros(3))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3)])
def test_statistics_of_a_single_value_are_refused_as_by_torch(norm: nn.Module) -> None:
    with Replaced(TRANSFORMABLE), pytest.raises(ValueError, match="more than 1"):
        norm(torch.randn(1, 3, 1))


def test_torchs_own_third_derivatives_of_the_norms_are_wrong() -> None:
    # Remove the compositions of the norms once torch has right derivatives.
    for name in ("layer_norm", "batch_norm in train mode", "instance_norm"):
        function, composed, shapes = CASES[name]
        point = tuple(drawn(*shape, seed=60 + i) for i, shape in enumerate(shapes))
        found, expected = (grad(third(f, False))(*point) for f in (function, composed))
        assert relative_error(found, expected) > 1e-2
