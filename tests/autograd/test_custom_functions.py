"""Custom autograd functions: right ones pass, and what autograd would lose is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.autograd.custom_functions import _is_foreign
from tests.reference import gauss_newton, hessian, matrix, relative_error

Map = Callable[[Tensor], Tensor]


def plain(x: Tensor) -> Tensor:
    """The function that the custom ones compute."""
    return x.sin() * x


def slope(x: Tensor) -> Tensor:
    return x.cos() * x + x.sin()


def saved(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    return plain(x)


def custom(backward: Callable[[Any, Tensor], Any], forward: Callable[..., Tensor] = saved) -> Map:
    made = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Custom", (Function,), made).apply  # type: ignore[attr-defined, no-any-return]


def without_grad(ctx: Any, g: Tensor) -> Tensor:
    with torch.no_grad():
        return g * slope(ctx.saved_tensors[0])


def by_numpy(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return torch.from_numpy(g.detach().numpy() * slope(x.detach()).numpy())


def with_intermediate(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x, x.sin(), x.cos())
    return plain(x)


def of_intermediate(ctx: Any, g: Tensor) -> Tensor:
    x, sine, cosine = ctx.saved_tensors
    return g * (cosine * x + sine)


def with_attribute(ctx: Any, x: Tensor) -> Tensor:
    ctx.slope = slope(x)
    return plain(x)


class Several(Function):
    """Several inputs and outputs, one of them an integer, and a flag."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, power: int, detached: bool) -> tuple[Tensor, Tensor, Tensor]:
        return x * w, x**power, torch.arange(3)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.power, ctx.detached = inputs[2:]
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        if ctx.detached:
            w = w.detach()
        return g * w + h * ctx.power * x ** (ctx.power - 1), g * x, None, None


def several(detached: bool) -> Map:
    def mapped(x: Tensor) -> Tensor:
        first, second, _ = Several.apply(x, x.cos(), 3, detached)
        return first + second

    return mapped


class InPlace(Function):
    """The exponential, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.exp_())
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Float32(Function):
    """A kernel that takes float32 alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("expected float32")
        return saved(ctx, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * slope(ctx.saved_tensors[0])


class Float32Detached(Float32):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * slope(ctx.saved_tensors[0].detach())


def rounded(x: Tensor) -> Tensor:
    return torch.round(4 * x) / 4


RIGHT: dict[str, tuple[Map, Map]] = {
    "by saved inputs": (custom(lambda ctx, g: g * slope(ctx.saved_tensors[0])), plain),
    "kinks": (
        custom(
            lambda ctx, g: g * (ctx.saved_tensors[0] > 0),
            lambda c, x: (c.save_for_backward(x), x.clamp(min=0))[1],
        ),
        F.relu,
    ),
    "straight through": (
        custom(lambda ctx, g: g, lambda ctx, x: rounded(x)),
        lambda x: x + (rounded(x) - x).detach(),
    ),
    "several": (several(False), lambda x: x * x.cos() + x**3),
    "in place": (lambda x: InPlace.apply(x * 1), torch.exp),
}
LOSES_INPUTS: dict[str, Map] = {
    "detached": custom(lambda ctx, g: g * slope(ctx.saved_tensors[0].detach())),
    "data": custom(lambda ctx, g: g * slope(ctx.saved_tensors[0].data)),
    "intermediate": custom(of_intermediate, with_intermediate),
    "attribute": custom(lambda ctx, g: g * ctx.slope, with_attribute),
    "several": several(True),
}
LOSES_COTANGENTS: dict[str, Map] = {
    "once differentiable": custom(
        once_differentiable(lambda ctx, g: g * slope(ctx.saved_tensors[0]))
    ),
    "no_grad": custom(without_grad),
    "numpy": custom(by_numpy),
    "clipped": custom(lambda ctx, g: g.clamp(-0.01, 0.01), lambda ctx, x: x.view_as(x)),
}


class Net(nn.Module):
    def __init__(self, inner: Map, *, last: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.inner, self.last = inner, last

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            return self.inner(self.second(torch.tanh(self.first(x))))
        return self.second(torch.tanh(self.inner(self.first(x))))


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 1])


def problem(inner: Map, **options: Any) -> tuple[hf.Loss, dict[str, Tensor]]:
    model_fn, params = hf.functional(Net(inner, **options))
    return hf.supervised(model_fn, F.cross_entropy), params


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_have_right_matrices(name: str, last: bool) -> None:
    function, plainly = RIGHT[name]
    loss, params = problem(function, last=last)
    same, _ = problem(plainly, last=last)
    found = matrix(hf.hvp(loss)(params, (X, Y)), params)
    assert relative_error(found, hessian(same, params, (X, Y))) < 1e-10
    found = matrix(hf.ggnvp(loss)(params, (X, Y)), params)
    assert relative_error(found, gauss_newton(same, params, (X, Y))) < 1e-10


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", [*LOSES_INPUTS, *LOSES_COTANGENTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_lost_second_derivative_is_refused(name: str, last: bool, dtype: torch.dtype) -> None:
    loss, params = problem((LOSES_INPUTS | LOSES_COTANGENTS)[name], last=last)
    params = {key: leaf.to(dtype) for key, leaf in params.items()}
    operation = "Several" if name == "several" else "Custom"
    with pytest.raises(NotImplementedError, match=rf"{operation} has a gradient, but autograd"):
        hf.hvp(loss)(params, (X.to(dtype), Y))


@pytest.mark.parametrize("of", [hf.ggnvp, hf.fvp, hf.efvp])
@pytest.mark.parametrize("name", LOSES_INPUTS)
def test_gauss_newton_needs_the_cotangents_alone(name: str, of: Any) -> None:
    loss, params = problem(LOSES_INPUTS[name])
    plainly = RIGHT["several"][1] if name == "several" else plain
    same, _ = problem(plainly)
    found = matrix(of(loss)(params, (X, Y)), params)
    assert relative_error(found, matrix(of(same)(params, (X, Y)), params)) < 1e-10


@pytest.mark.parametrize(
    "of", [hf.ggnvp, hf.fvp, hf.efvp, lambda loss: hf.pchvp(loss, residual="zero")]
)
@pytest.mark.parametrize("name", LOSES_COTANGENTS)
def test_a_lost_jacobian_is_refused(name: str, of: Any) -> None:
    loss, params = problem(LOSES_COTANGENTS[name])
    with pytest.raises(NotImplementedError, match="Custom has a gradient, but autograd"):
        of(loss)(params, (X, Y))


@pytest.mark.parametrize(
    "of", [hf.pchvp, hf.functional_hvp, lambda loss: hf.hvp(loss, mode="forward")]
)
def test_other_curvatures_refuse_it_too(of: Any) -> None:
    loss, params = problem(LOSES_INPUTS["detached"])
    with pytest.raises(NotImplementedError, match="Custom has a gradient, but autograd"):
        of(loss)(params, (X, Y))


def test_a_criterion_is_checked_too() -> None:
    model_fn, params = hf.functional(Net(torch.tanh))
    for name, refused in (("by saved inputs", False), ("detached", True)):
        function = LOSES_INPUTS[name] if refused else RIGHT[name][0]
        criterion = lambda out, _, function=function: function(out).square().mean()  # noqa: E731
        loss = hf.supervised(model_fn, criterion)
        if refused:
            with pytest.raises(NotImplementedError, match="Custom has a gradient"):
                hf.ggnvp(loss)(params, (X, Y))
        else:
            same = hf.supervised(model_fn, lambda out, _: plain(out).square().mean())
            found = matrix(hf.ggnvp(loss)(params, (X, Y)), params)
            assert relative_error(found, gauss_newton(same, params, (X, Y))) < 1e-10


def test_kernels_of_float32_alone_are_checked_in_float32() -> None:
    x = X.float()
    for function, refused in ((Float32, False), (Float32Detached, True)):
        loss, params = problem(function.apply)
        params = {name: leaf.float() for name, leaf in params.items()}
        if refused:
            with pytest.raises(NotImplementedError, match="Float32Detached has a gradient"):
                hf.hvp(loss)(params, (x, Y))
        else:
            same, _ = problem(plain)
            found = matrix(hf.hvp(loss)(params, (x, Y)), params)
            assert relative_error(found, hessian(same, params, (x, Y))) < 1e-4


def test_recomputed_parts_are_checked() -> None:
    for detached in (False, True):
        model_fn, params = hf.functional(
            nn.Sequential(nn.Linear(4, 3), Applied(several(detached))).double(), recompute="1"
        )
        loss = hf.supervised(model_fn, F.cross_entropy)
        if detached:
            with pytest.raises(NotImplementedError, match="Several has a gradient"):
                hf.hvp(loss)(params, (X, Y))
        else:
            same = hf.composed(
                lambda p, b: RIGHT["several"][1](F.linear(b[0], p["0.weight"], p["0.bias"])),
                lambda out, b: F.cross_entropy(out, b[1]),
            )
            found = matrix(hf.hvp(loss)(params, (X, Y)), params)
            assert relative_error(found, hessian(same, params, (X, Y))) < 1e-10


class Applied(nn.Module):
    def __init__(self, function: Map) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_the_check_is_made_once_and_leaves_the_class_as_it_was() -> None:
    calls = []

    def forward(ctx: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return saved(ctx, x)

    function = custom(lambda ctx, g: g * slope(ctx.saved_tensors[0]), forward)
    loss, params = problem(function)
    curvature = hf.hvp(loss)
    curvature(params, (X, Y))
    first = len(calls)
    curvature(params, (X, Y))
    assert len(calls) == first + 1
    assert vars(function.__self__)["forward"].__func__ is forward  # type: ignore[attr-defined]


@torch.library.custom_op("hessfunc_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    """A custom operator with a right derivative."""
    return x**3


@torch.library.custom_op("hessfunc_tests::cube_once", mutates_args=())
def cube_once(x: Tensor) -> Tensor:
    """A custom operator whose derivative has none."""
    return x**3


@torch.library.custom_op("hessfunc_tests::bare", mutates_args=())
def bare(x: Tensor) -> Tensor:
    """A custom operator without a derivative."""
    return x**3


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


cube.register_autograd(lambda ctx, g: 3 * g * ctx.saved_tensors[0] ** 2, setup_context=_save)
cube_once.register_autograd(
    lambda ctx, g: 3 * g * ctx.saved_tensors[0].detach() ** 2, setup_context=_save
)


def test_custom_operators() -> None:
    loss, params = problem(cube)
    same, _ = problem(lambda x: x**3)
    found = matrix(hf.hvp(loss)(params, (X, Y)), params)
    assert relative_error(found, hessian(same, params, (X, Y))) < 1e-10
    loss, params = problem(cube_once)
    with pytest.raises(NotImplementedError, match="custom operator hessfunc_tests_cube_once has"):
        hf.hvp(loss)(params, (X, Y))
    loss, params = problem(bare)
    with pytest.raises(NotImplementedError, match="operator hessfunc_tests.*bare has no deriv"):
        hf.hvp(loss)(params, (X, Y))


def test_an_operator_without_an_autograd_kernel_is_refused() -> None:
    library = torch.library.Library("hessfunc_tests_raw", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x.detach(), "CPU")
    loss, params = problem(lambda x: x + torch.ops.hessfunc_tests_raw.twice(x))
    with pytest.raises(NotImplementedError, match="custom operator of torch.library without"):
        hf.hvp(loss)(params, (X, Y))


def test_nodes_of_extensions_are_told_from_those_of_torch() -> None:
    # As C++ names them; to compile an extension takes a minute.
    for name in ("torch::autograd::CppNode<Function>", "torch::autograd::WarnNotImplemented"):
        assert _is_foreign(name)
    moved = torch.ones(3, requires_grad=True).clone()
    moved[1] = 2
    assert not _is_foreign(moved.grad_fn.name())  # type: ignore[union-attr]


def hooked(hook: Callable[[Tensor], Any]) -> Map:
    def mapped(x: Tensor) -> Tensor:
        y = x.sin()
        if y.requires_grad:
            y.register_hook(hook)
        return y

    return mapped


@pytest.mark.parametrize("of", [hf.hvp, hf.ggnvp])
def test_hooks_that_detach_are_refused_and_others_are_not(of: Any) -> None:
    norms: list[float] = []
    loss, params = problem(hooked(lambda g: norms.append(float(g.detach().norm()))))
    same, _ = problem(torch.sin)
    found = matrix(of(loss)(params, (X, Y)), params)
    assert relative_error(found, matrix(of(same)(params, (X, Y)), params)) < 1e-10
    assert norms

    def detaching(g: Tensor) -> Tensor:
        return g.detach()

    loss, params = problem(hooked(detaching))
    with pytest.raises(NotImplementedError, match=r"passes through the hook .*detaching, which"):
        of(loss)(params, (X, Y))


def test_hooks_that_scale_gradients_are_refused() -> None:
    """Autograd applies the hook again to the derivative of the gradient, which is 6.9, not 2.4."""
    loss, params = problem(hooked(lambda g: 2 * g))
    with pytest.raises(NotImplementedError, match="lambda> changes the gradient"):
        hf.hvp(loss)(params, (X, Y))


@pytest.mark.parametrize("detaches", [False, True])
def test_backward_hooks_of_modules(detaches: bool) -> None:
    def hook(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return (inputs[0].detach(),) if detaches else None

    model = Net(torch.sin)
    model.second.register_full_backward_hook(hook)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    if detaches:
        with pytest.raises(NotImplementedError, match="hook"):
            hf.hvp(loss)(params, (X, Y))
        return
    same, _ = problem(torch.sin)
    found = matrix(hf.hvp(loss)(params, (X, Y)), params)
    assert relative_error(found, hessian(same, params, (X, Y))) < 1e-10


def test_differences_refuse_a_backward_that_is_another_derivative() -> None:
    for name in ("by saved inputs", "kinks"):
        loss, params = problem(RIGHT[name][0])
        same, _ = problem(RIGHT[name][1])
        found = matrix(hf.hvp(loss, mode="difference")(params, (X, Y)), params)
        assert relative_error(found, hessian(same, params, (X, Y))) < 1e-6
    loss, params = problem(RIGHT["straight through"][0])
    with pytest.raises(NotImplementedError, match=r"Custom is not the derivative.*straight"):
        hf.hvp(loss, mode="difference")(params, (X, Y))


def test_functions_without_a_forward_derivative_are_named_in_forward_mode() -> None:
    loss, params = problem(RIGHT["by saved inputs"][0])
    matvec = hf.hvp(loss, mode="forward")(params, (X, Y))
    with pytest.raises(NotImplementedError, match=r"no `setup_context`.*mode='reverse'"):
        matvec(hf.random_like(params, 1, seed=0))
