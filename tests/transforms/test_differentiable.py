"""Products under the transforms of torch.func, torch.compile and autograd.

The references are extrapolated differences of products that no transform sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.trees import leaves, tree_map
from tests.cases import NAMES, case
from tests.reference import directional_derivative, flat

Tree = Any
SEVERAL = ["mlp", "conv", "multi-head attention, fused", "lstm", "gpt2"]


def of_halves(loss: hf.Loss, **options: Any) -> hf.matvecs.Curvature:
    """The Hessian of a mean over two batches, made of one batch."""
    mean = hf.over_batches(hf.hvp(loss, **options), weight=lambda batch: 1.0)
    return lambda params, batch: mean(params, [batch, batch])


CURVATURES: dict[str, Callable[..., Any]] = {
    "hvp": hf.hvp,
    "ggnvp": hf.ggnvp,
    "fvp": hf.fvp,
    "sampled fvp": partial(hf.fvp, samples=3, seed=0),
    "efvp": hf.efvp,
    "functional_hvp": hf.functional_hvp,
    "over_batches": of_halves,
}
# Its masks depend on the order in which activations lie in memory.
OTHER_MASK = "transformer encoder layer, dropout"
LIKELIHOODS = ["mlp", "conv", "lstm", "dropout"]
CELLS = [
    *((of, name) for of in ("hvp", "ggnvp") for name in NAMES if name != OTHER_MASK),
    *(("fvp", name) for name in LIKELIHOODS),
    *(("sampled fvp", name) for name in LIKELIHOODS),
    *((of, name) for of in ("efvp", "functional_hvp", "over_batches") for name in SEVERAL),
]
FEW = [(of, name) for of, name in CELLS if name in SEVERAL]
each_cell = pytest.mark.parametrize(("of", "name"), CELLS)
few_cells = pytest.mark.parametrize(("of", "name"), FEW)


class Cell:
    """A curvature of a case, two directions, and what its products are."""

    def __init__(self, of: str, name: str) -> None:
        found = case(name)
        self.loss, self.params, self.batch = found.loss, found.params, found.batch
        self.make = CURVATURES[of]
        self.curvature = self.make(self.loss)
        generator = torch.Generator().manual_seed(1)
        self.v, self.u = (self._random(generator) for _ in range(2))
        # The first plain product also tells `efvp` whether the criterion is a mean.
        self.plain = self.product(self.params)

    def _random(self, generator: torch.Generator) -> Tree:
        return {
            name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            for name, leaf in self.params.items()
        }

    def product(self, params: Tree, vector: Tree | None = None, batch: Any = None) -> Tree:
        matvec = self.curvature(params, self.batch if batch is None else batch)
        return hf.apply(matvec, self.v if vector is None else vector)

    def quadratic(self, params: Tree) -> Tensor:
        return dot(self.v, self.product(params))

    @property
    def derivative(self) -> Tensor:
        return directional_derivative(self.product, self.params, self.u)


@cache
def cell(of: str, name: str) -> Cell:
    return Cell(of, name)


@cache
def derivative(of: str, name: str) -> Tensor:
    """d/dt A(params + t u) v, flat."""
    return cell(of, name).derivative


def dot(a: Tree, b: Tree) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(leaves(a), leaves(b), strict=True)]).sum()


def close(found: Tree, wanted: Tree | Tensor) -> None:
    a, b = (x if isinstance(x, Tensor) else flat(x) for x in (found, wanted))
    size = float(b.detach().abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * max(size, 1e-3))


def stacked(tree: Tree, count: int, along: Tree) -> Tree:
    return tree_map(lambda x, d: torch.stack([x + 0.01 * i * d for i in range(count)]), tree, along)


# With respect to the parameters.


@each_cell
def test_jvp(of: str, name: str) -> None:
    one = cell(of, name)
    found, slope = jvp(one.product, (one.params,), (one.u,))
    close(found, one.plain)
    close(slope, derivative(of, name))


@each_cell
def test_grad(of: str, name: str) -> None:
    one = cell(of, name)
    found = dot(grad(one.quadratic)(one.params), one.u)
    close(found, flat(one.v) @ derivative(of, name))


@few_cells
def test_vjp(of: str, name: str) -> None:
    one = cell(of, name)
    found, pull = vjp(one.product, one.params)
    close(found, one.plain)
    close(dot(pull(one.u)[0], one.u), flat(one.u) @ derivative(of, name))


@pytest.mark.parametrize("of", CURVATURES)
def test_jacobians(of: str) -> None:
    one = cell(of, "mlp")
    for jacobian in (jacrev, jacfwd):
        along = tree_map(
            lambda *parts: sum(
                torch.tensordot(part, d, dims=d.dim())
                for part, d in zip(parts, leaves(one.u), strict=True)
            ),
            *(
                {row: columns[name] for row, columns in jacobian(one.product)(one.params).items()}
                for name in one.params
            ),
        )
        close(along, derivative(of, "mlp"))


@pytest.mark.parametrize("of", CURVATURES)
def test_fourth_derivatives(of: str) -> None:
    one = cell(of, "mlp")
    second = jvp(grad(one.quadratic), (one.params,), (one.u,))[1]
    close(second, directional_derivative(grad(one.quadratic), one.params, one.u))
    blocks = hessian(one.quadratic)(one.params)
    rows = {
        row: sum(torch.tensordot(blocks[row][name], d, dims=d.dim()) for name, d in one.u.items())
        for row in one.params
    }
    close(rows, second)


@each_cell
def test_an_ensemble_by_vmap(of: str, name: str) -> None:
    one = cell(of, name)
    nets = stacked(one.params, 8, one.u)
    found = vmap(one.product, randomness="same")(nets)
    for i in (0, 7):
        close(
            tree_map(lambda x, i=i: x[i], found), one.product(tree_map(lambda x, i=i: x[i], nets))
        )


@few_cells
def test_the_gradients_of_an_ensemble(of: str, name: str) -> None:
    one = cell(of, name)
    nets = stacked(one.params, 3, one.u)
    each = vmap(grad(one.quadratic), randomness="same")(nets)
    together = grad(lambda p: vmap(one.quadratic, randomness="same")(p).sum())(nets)
    close(each, together)
    close(tree_map(lambda x: x[0], each), grad(one.quadratic)(one.params))


# With respect to the batch.


def of_examples(batch: Any) -> Any:
    """The batch with a second axis of length 1: the examples of `vmap` are batches of one."""
    return tree_map(lambda x: x.unsqueeze(1), batch)


@pytest.mark.parametrize("name", ["mlp", "conv", "multi-head attention, fused", "lstm", "gpt2"])
@pytest.mark.parametrize("of", ["hvp", "ggnvp", "efvp", "functional_hvp", "over_batches"])
def test_products_of_each_example(of: str, name: str) -> None:
    one = cell(of, name)
    examples = of_examples(one.batch)
    found = vmap(lambda batch: one.product(one.params, batch=batch))(examples)
    last = tree_map(lambda x: x[-1], examples)
    close(tree_map(lambda x: x[-1], found), one.product(one.params, batch=last))
    # The losses are means over examples of equal weight, and so are their Hessians.
    close(tree_map(lambda x: x.mean(0), found), one.plain)


@pytest.mark.parametrize("name", ["mlp", "conv", "multi-head attention, fused", "lstm"])
@pytest.mark.parametrize("of", ["hvp", "ggnvp", "fvp", "efvp", "functional_hvp", "over_batches"])
def test_the_gradient_of_the_inputs(of: str, name: str) -> None:
    if of == "fvp" and name not in LIKELIHOODS:
        pytest.skip("its criterion is no likelihood of `fvp`")
    one = cell(of, name)
    inputs, targets = one.batch

    def quadratic(inputs: Tensor) -> Tensor:
        return dot(one.v, one.product(one.params, batch=(inputs, targets)))

    along = torch.linspace(-1, 1, inputs.numel(), dtype=inputs.dtype).view_as(inputs)
    found = (grad(quadratic)(inputs) * along).sum()
    close(found, directional_derivative(quadratic, inputs, along)[0])


def test_the_gradient_of_a_tensor_in_the_loss() -> None:
    one = cell("hvp", "mlp")

    def quadratic(scale: Tensor) -> Tensor:
        matvec = hf.hvp(lambda p, b: scale.square() * one.loss(p, b))(one.params, one.batch)
        return dot(one.v, hf.apply(matvec, one.v))

    close(grad(quadratic)(torch.tensor(3.0, dtype=torch.float64)), 6 * dot(one.v, one.plain))


# With respect to the vectors.


@each_cell
def test_products_are_linear_in_the_vectors(of: str, name: str) -> None:
    one = cell(of, name)
    matvec = one.curvature(one.params, one.batch)
    product = partial(hf.apply, matvec)
    close(grad(lambda v: dot(v, product(v)))(one.v), tree_map(lambda x: 2 * x, one.plain))
    close(jvp(product, (one.u,), (one.v,))[1], one.plain)
    block = stacked(one.v, 3, one.u)
    close(vmap(product)(block), matvec(block))
    close(
        vmap(matvec)(tree_map(lambda x: x[:, None], block)),
        tree_map(lambda x: x[:, None], matvec(block)),
    )
    nested = vmap(grad(lambda v: dot(v, product(v))))(block)
    close(nested, tree_map(lambda x: 2 * x, matvec(block)))
    # Made inside of one transform, and applied inside of another.
    inside = vmap(
        lambda p: grad(lambda v: dot(v, hf.apply(one.curvature(p, one.batch), v)))(one.v),
        randomness="same",
    )(stacked(one.params, 2, one.u))
    close(tree_map(lambda x: x[0], inside), tree_map(lambda x: 2 * x, one.plain))


@few_cells
def test_blocks_of_vectors_under_a_transform(of: str, name: str) -> None:
    one = cell(of, name)
    block = stacked(one.v, 3, one.u)

    def total(params: Tree) -> Tensor:
        return dot(block, one.curvature(params, one.batch)(block))

    def one_by_one(params: Tree) -> Tensor:
        vectors = [tree_map(lambda x, i=i: x[i], block) for i in range(3)]
        return torch.stack([dot(v, one.product(params, v)) for v in vectors]).sum()

    close(grad(total)(one.params), grad(one_by_one)(one.params))


def test_a_positive_curvature_matrix_is_transformed_by_its_vectors() -> None:
    one = case("mlp")
    curvature = hf.pchvp(one.loss)
    matvec = curvature(one.params, one.batch)
    vector = tree_map(torch.ones_like, one.params)
    plain = hf.apply(matvec, vector)
    found = grad(lambda v: dot(v, hf.apply(matvec, v)))(vector)
    close(found, tree_map(lambda x: 2 * x, plain))
    with pytest.raises(NotImplementedError, match="outside"):
        grad(lambda p: dot(vector, hf.apply(curvature(p, one.batch), vector)))(one.params)


def test_activations() -> None:
    found = case("mlp")
    loss, zeros = hf.activations(found.model, F.cross_entropy, "2")
    at = zeros(found.batch[0])
    vector = tree_map(lambda x: torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x), at)
    product = lambda z: hf.apply(hf.hvp(loss)(z, found.batch), vector)  # noqa: E731
    close(jvp(product, (at,), (vector,))[1], directional_derivative(product, at, vector))


# torch.compile.


def linear_net() -> tuple[hf.Loss, Tree, Any]:
    """A net of tensors, without a module."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (4, 3), "second": (2, 4), "inputs": (5, 3)}
    first, second, inputs = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()
    )
    loss = hf.supervised(lambda p, x: torch.tanh(x @ p["first"].T) @ p["second"].T, F.cross_entropy)
    return loss, {"first": first, "second": second}, (inputs, torch.tensor([0, 1, 1, 0, 1]))


@pytest.mark.parametrize("of", [of for of in CURVATURES if of != "sampled fvp"])
def test_compiled(of: str) -> None:
    loss, params, batch = linear_net()
    make, block = CURVATURES[of], stacked(params, 3, params)

    @partial(torch.compile, fullgraph=True, backend="eager")
    def products(params: Tree, block: Tree) -> Tree:
        return make(loss)(params, batch)(block)

    close(products(params, block), make(loss)(params, batch)(block))


def test_a_compiled_gradient_of_a_product() -> None:
    loss, params, batch = linear_net()
    gradient = grad(lambda p: dot(params, hf.apply(hf.hvp(loss)(p, batch), params)))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    close(compiled(params), gradient(params))


# Plain autograd.


@each_cell
def test_autograd(of: str, name: str) -> None:
    one = cell(of, name)
    params = {key: leaf.clone().requires_grad_() for key, leaf in one.params.items()}
    matvec = one.make(one.loss, differentiable=True)(params, one.batch)
    block = stacked(one.v, 2, one.u)
    products = matvec(block)
    close(tree_map(lambda x: x[0].detach(), products), one.plain)
    value = dot(one.v, tree_map(lambda x: x[0], products))
    if name == "mse loss":
        # The Hessian of a linear model is constant.
        assert not value.requires_grad
        return
    slopes = torch.autograd.grad(value, leaves(params), materialize_grads=True)
    found = sum((s * d).sum() for s, d in zip(slopes, leaves(one.u), strict=True))
    close(found, flat(one.v) @ derivative(of, name))


@pytest.mark.parametrize("of", CURVATURES)
def test_autograd_follows_batch_and_vectors(of: str) -> None:
    one = cell(of, "mlp")
    inputs = one.batch[0].clone().requires_grad_()
    vector = tree_map(lambda x: x.clone().requires_grad_(), one.v)
    matvec = one.make(one.loss, differentiable=True)(one.params, (inputs, one.batch[1]))
    value = dot(vector, hf.apply(matvec, vector))
    of_inputs, *of_vector = torch.autograd.grad(value, [inputs, *leaves(vector)])
    close(torch.cat([x.flatten() for x in of_vector]), 2 * flat(one.plain))
    if of == "sampled fvp":
        # The targets are drawn anew for other inputs.
        return
    along = torch.ones_like(inputs).detach()
    wanted = directional_derivative(
        lambda x: dot(one.v, one.product(one.params, batch=(x, one.batch[1]))),
        one.batch[0],
        along,
    )
    close((of_inputs * along).sum(), wanted[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_without_gradients_are_constants(mode: Callable[[], Any]) -> None:
    c = case("mlp")
    vector = {name: torch.ones_like(leaf) for name, leaf in c.params.items()}
    expected = hf.apply(hf.hvp(c.loss)(c.params, c.batch), vector)
    with mode():
        batch = tuple(t.clone() for t in c.batch)
        found = hf.apply(hf.hvp(c.loss, differentiable=True)(c.params, batch), vector)
    torch.testing.assert_close(found, expected)
    assert not any(leaf.requires_grad for leaf in found.values())


@pytest.mark.parametrize("of", [*CURVATURES, "pchvp", "hvp_by_backward", "kfac", "hbp"])
def test_a_product_is_never_silently_constant(of: str) -> None:
    found = case("mlp")
    params = dict(found.model.named_parameters())
    curvature = {
        **{key: make(found.loss) for key, make in CURVATURES.items()},
        "pchvp": hf.pchvp(found.loss),
        "kfac": hf.kronecker.kfac(found.loss, found.model),
        "hbp": hf.kronecker.hbp(found.loss, found.model),
        "hvp_by_backward": hf.hvp_by_backward(
            found.model, lambda batch: F.cross_entropy(found.model(batch[0]), batch[1])
        ),
    }[of]
    vector = tree_map(torch.ones_like, params)
    product = hf.apply(curvature(params, found.batch), vector)
    penalty = found.loss(params, found.batch) + 10 * dot(vector, product)
    with pytest.raises(RuntimeError, match="no_grad"):
        penalty.backward()
    with torch.no_grad():
        assert not dot(vector, hf.apply(curvature(params, found.batch), vector)).requires_grad


@pytest.mark.parametrize("make", [hf.hvp, hf.ggnvp, hf.functional_hvp])
def test_tensors_in_the_loss_are_never_silently_constant(make: Callable[..., Any]) -> None:
    found = case("mlp")
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = hf.composed(
        lambda params, batch: weight.square() * found.loss.outputs(params, batch),
        lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    )
    vector = tree_map(torch.ones_like, found.params)
    product = hf.apply(make(loss)(found.params, found.batch), vector)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        dot(vector, product).backward()
    attached = hf.apply(make(loss, differentiable=True)(found.params, found.batch), vector)
    (slope,) = torch.autograd.grad(dot(vector, attached), weight)

    def quadratic(weight: Tensor) -> Tensor:
        scaled = hf.composed(
            lambda params, batch: weight.square() * found.loss.outputs(params, batch),
            lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        )
        return dot(vector, hf.apply(make(scaled)(found.params, found.batch), vector))

    ones = torch.ones_like(weight).detach()
    close(slope.sum(), directional_derivative(quadratic, ones, ones)[0])


def test_a_penalty_trains() -> None:
    found = case("mlp")
    params = {name: leaf.clone().requires_grad_() for name, leaf in found.params.items()}
    vector = tree_map(torch.ones_like, found.params)
    curvature = hf.hvp(found.loss, differentiable=True)
    sharpness = []
    for _ in range(20):
        value = dot(vector, hf.apply(curvature(params, found.batch), vector))
        sharpness.append(float(value.detach()))
        slopes = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
        with torch.no_grad():
            for leaf, slope in zip(params.values(), slopes, strict=True):
                leaf -= 0.01 * slope
    assert sharpness[-1] < sharpness[0]


# What is refused.


class Detached(torch.autograd.Function):
    """Square whose backward is not differentiable."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0].detach())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * slope.detach()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return Detached.apply(x), in_dims[0]


def test_custom_functions_are_refused_under_transforms() -> None:
    def loss(params: Tensor, batch: Tensor) -> Tensor:
        return Detached.apply(params * batch).sum()

    params = batch = torch.ones(3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="Detached"):
        grad(lambda p: hf.apply(hf.hvp(loss)(p, batch), params).sum())(params)
    with pytest.raises(NotImplementedError, match="Detached"):
        hf.hvp(loss, differentiable=True)(params, batch)


def test_a_loss_that_ignores_params_is_refused() -> None:
    model = nn.Linear(2, 1).double()
    params = dict(model.named_parameters())
    batch = torch.ones(3, 2, dtype=torch.float64)
    curvature = hf.hvp(lambda params, batch: model(batch).sum())
    with pytest.raises(ValueError, match="does not depend on params"):
        jvp(lambda p: curvature(p, batch)(tree_map(lambda x: x[None], p)), (params,), (params,))


def test_kept_graphs_have_no_mode_to_differentiate() -> None:
    for mode in ("forward", "difference"):
        with pytest.raises(ValueError, match="mode='reverse'"):
            hf.hvp(lambda p, b: p.sum(), mode=mode, differentiable=True)  # type: ignore[arg-type]


def test_hidden_weights_are_asked_for() -> None:
    loss, params, batch = linear_net()
    mean = hf.over_batches(hf.hvp(loss))

    def product(batch: Any) -> Tree:
        return hf.apply(mean(params, [batch, batch]), params)

    with pytest.raises(NotImplementedError, match="weight"):
        vmap(product)(of_examples(batch))
    with pytest.raises(Exception, match="weight"):
        torch.compile(product, fullgraph=True, backend="aot_eager")(batch)


def test_hidden_examples_draw_no_targets() -> None:
    loss, params, batch = linear_net()
    curvature = hf.fvp(loss, samples=2, seed=0)

    def product(batch: Any) -> Tree:
        return hf.apply(curvature(params, batch), params)

    with pytest.raises(NotImplementedError, match="drawn"):
        vmap(product)(of_examples(batch))
    with pytest.raises(Exception, match="drawn"):
        torch.compile(product, fullgraph=True, backend="aot_eager")(batch)
