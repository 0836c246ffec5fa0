"""Cross-entropy of a linear layer, against whole logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import randn, waves
from tests.graphs import allocated
from tests.reference import gradient, hessian, matrix, relative_error

IGNORED = -100
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "scale": 0.3},
    "bounded": {"softcap": 1.5},
    "sum": {"reduction": "sum", "softcap": 2.0, "scale": 1.3, "label_smoothing": 0.2},
}
STATES = {"hidden": waves(2, 5, 4), "weight": waves(7, 4), "bias": waves(7)}


def targets() -> Tensor:
    y = torch.arange(10).view(2, 5) * 3 % 7
    y[0, 1] = IGNORED
    return y


def whole(p: Any, options: dict[str, Any]) -> Tensor:
    z = F.linear(p["hidden"], p["weight"], p.get("bias")) * options.get("scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    rest = {k: v for k, v in options.items() if k in ("reduction", "label_smoothing")}
    return F.cross_entropy(z.flatten(0, 1), targets().flatten(), **rest)


def in_chunks(p: Any, options: dict[str, Any]) -> Tensor:
    return hf.linear_cross_entropy(
        p["hidden"], p["weight"], targets(), bias=p.get("bias"), rows_per_chunk=3, **options
    )


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_gradients_and_products_are_those_of_whole_logits(
    name: str, with_bias: bool
) -> None:
    options = OPTIONS[name]
    p = {k: v for k, v in STATES.items() if with_bias or k != "bias"}
    assert torch.isclose(in_chunks(p, options), whole(p, options), rtol=1e-12)
    due = gradient(lambda p, _: whole(p, options), p, None)
    assert relative_error(gradient(lambda p, _: in_chunks(p, options), p, None), due) < 1e-12
    exact = hessian(lambda p, _: whole(p, options), p, None)
    for mode, chunk in (("reverse", 1), ("reverse", 4), ("forward", 4)):
        product = hf.hvp(lambda p, _: in_chunks(p, options), mode=mode, chunk_size=chunk)  # type: ignore[arg-type]
        assert relative_error(matrix(product(p, None), p), exact) < 1e-12, (mode, chunk)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_constant_state_gets_no_gradient(frozen: str) -> None:
    p = {k: v for k, v in STATES.items() if k != frozen}
    options = OPTIONS["bounded"]

    def loss(p: Any, _: Any) -> Tensor:
        return in_chunks({**STATES, **p}, options)

    exact = hessian(lambda p, _: whole({**STATES, **p}, options), p, None)
    assert relative_error(matrix(hf.hvp(loss)(p, None), p), exact) < 1e-12


def test_third_derivatives_are_those_of_whole_logits() -> None:
    v = {k: randn(*x.shape) for k, x in STATES.items()}

    def quadratic(loss: Any, p: Any, **options: Any) -> Tensor:
        product = hf.hvp(lambda p, _: loss(p, OPTIONS["sum"]), **options)(p, None)
        return hf.inner(v, hf.apply(product, v))

    due = torch.func.grad(lambda p: quadratic(whole, p))(STATES)
    mapped = torch.func.grad(lambda p: quadratic(in_chunks, p))(STATES)
    moving = {k: x.clone().requires_grad_() for k, x in STATES.items()}
    attached = torch.autograd.grad(
        quadratic(in_chunks, moving, differentiable=True), list(moving.values())
    )
    for (name, x), y in zip(due.items(), attached, strict=True):
        assert relative_error(mapped[name], x) < 1e-12
        assert relative_error(y, x) < 1e-12


def test_per_example_gradients_and_cotangents_may_be_mapped() -> None:
    each = torch.vmap(lambda g: torch.func.grad(lambda p: g * in_chunks(p, {}))(STATES))
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    alone = torch.func.grad(lambda p: whole(p, {}))(STATES)
    for name, gradients in each(scales).items():
        assert relative_error(gradients[1], -2 * alone[name]) < 1e-12
    moving = {k: x.clone().requires_grad_() for k, x in STATES.items()}
    value = in_chunks(moving, {})
    found = torch.autograd.grad(value, list(moving.values()), scales, is_grads_batched=True)
    for (_, x), gradients in zip(alone.items(), found, strict=True):
        assert relative_error(gradients[1], -2 * x) < 1e-12


def test_it_compiles_as_one_graph() -> None:
    compiled = torch.compile(lambda p: in_chunks(p, {}), fullgraph=True, backend="eager")
    assert torch.isclose(compiled(STATES), whole(STATES, {}), rtol=1e-12)


def test_low_precision_has_the_softmax_in_float32() -> None:
    p = {k: v.bfloat16() for k, v in STATES.items()}
    due = whole({k: v.float() for k, v in p.items()}, {})
    assert in_chunks(p, {}).dtype == torch.bfloat16
    assert torch.isclose(in_chunks(p, {}).float(), due, rtol=1e-2)


def test_logits_are_never_whole() -> None:
    rows, classes = 600, 4096
    hidden, weight = randn(rows, 4).float(), randn(classes, 4).float()
    y = torch.zeros(rows, dtype=torch.long)

    def product(loss: Any) -> Any:
        matvec = hf.hvp(lambda p, _: loss(p["h"], p["w"]))({"h": hidden, "w": weight}, None)
        return matvec({"h": hidden[None], "w": weight[None]})

    plain = allocated(lambda: product(lambda h, w: F.cross_entropy(h @ w.T, y))).peak
    ours = allocated(
        lambda: product(lambda h, w: hf.linear_cross_entropy(h, w, y, rows_per_chunk=50))
    )
    assert ours.peak < plain / 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"targets": torch.zeros(2, 5)}, "one integer class for each row"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, "one integer class for each row"),
        ({"weight": waves(4, 7)}, r"\(classes, features\)"),
        ({"bias": waves(4)}, "a bias of shape"),
        ({"softcap": 0.0}, "positive, or None"),
        ({"label_smoothing": 2.0}, r"in \[0, 1\]"),
        ({"reduction": "none"}, "'mean' or 'sum'"),
        ({"rows_per_chunk": 0}, "at least 1"),
    ],
)
def test_other_arguments_are_refused(change: dict[str, Any], match: str) -> None:
    given = {**STATES, "targets": targets(), **change}
    positional = [given.pop(name) for name in ("hidden", "weight", "targets")]
    with pytest.raises(ValueError, match=match):
        hf.linear_cross_entropy(*positional, **given)


def test_rows_that_do_not_count_may_be_infinite() -> None:
    p = dict(STATES)
    p["hidden"] = p["hidden"].clone()
    p["hidden"][0, 1] = torch.nan
    p["bias"] = p["bias"].clone()
    p["bias"][5] = -torch.inf
    y = torch.where(targets() == 5, IGNORED, targets())
    p["hidden"][y == IGNORED] = torch.inf

    def loss(weight: Tensor) -> Tensor:
        return hf.linear_cross_entropy(p["hidden"], weight, y, bias=p["bias"], rows_per_chunk=3)

    z = p["hidden"].masked_fill((y == IGNORED)[..., None], 0.0) @ p["weight"].T + p["bias"]
    due = F.cross_entropy(z.flatten(0, 1), y.flatten())
    assert torch.isclose(loss(p["weight"]), due, rtol=1e-12)
    assert torch.func.grad(loss)(p["weight"]).isfinite().all()
    weight = p["weight"].clone().requires_grad_()
    assert torch.autograd.grad(loss(weight), weight)[0].isfinite().all()


def test_narrow_integers_are_classes() -> None:
    y = torch.where(targets() == IGNORED, 0, targets())
    due = hf.linear_cross_entropy(STATES["hidden"], STATES["weight"], y)
    found = hf.linear_cross_entropy(STATES["hidden"], STATES["weight"], y.to(torch.uint8))
    assert torch.equal(found, due)


def test_other_dtypes_and_no_targets_are_refused() -> None:
    hidden, weight = STATES["hidden"], STATES["weight"]
    with pytest.raises(TypeError, match="the weight is torch.float32"):
        hf.linear_cross_entropy(hidden, weight.float(), targets())
    with pytest.raises(ValueError, match="one integer class"):
        hf.linear_cross_entropy(hidden, weight, targets() > 0)
    with pytest.raises(ValueError, match="no targets"):
        hf.linear_cross_entropy(hidden[:0], weight, targets()[:0])
