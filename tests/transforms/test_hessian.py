import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.memory import Footprint
from hessfunc.trees import Matvec
from tests.cases import (
    CLOSED_FORMS,
    NAMES,
    NO_FORWARD_MODE,
    OTHER_MASK_IN_FORWARD_MODE,
    case,
    closed_form,
    dense_hessian,
)
from tests.graphs import counted_graphs, resident_bytes
from tests.reference import block_like, gradient, hessian, matrix, relative_error, rows

Mode = Literal["reverse", "forward", "difference", "auto"]
MODES: tuple[Mode, ...] = ("reverse", "forward", "difference", "auto")
TOLERANCE = {"reverse": 1e-8, "forward": 1e-8, "auto": 1e-8, "difference": 1e-6}


def column_by_column(matvec: Matvec, like: Any) -> Tensor:
    """The dense matrix of a matvec, from products with single vectors."""
    n = hf.ravel(like).numel()
    columns = [
        hf.ravel(hf.apply(matvec, hf.unravel(e, like))) for e in torch.eye(n, dtype=torch.float64)
    ]
    return torch.stack(columns, dim=1)


# Values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("of", [matrix, column_by_column], ids=["block", "single"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name: str, of: Callable[..., Tensor], mode: Mode) -> None:
    problem = closed_form(name)
    found = of(hf.hvp(problem.loss, mode=mode)(problem.params, problem.batch), problem.params)
    assert (found - problem.hessian).abs().max() < TOLERANCE[mode]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_hessian(name: str) -> None:
    found = case(name)
    product = matrix(hf.hvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(product, dense_hessian(name)) < TOLERANCE["reverse"]
    assert relative_error(product.mT, product) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_differences_of_gradients_equal_the_dense_hessian(name: str) -> None:
    found = case(name)
    vectors = hf.random_like(found.params, 5, kind="normal", seed=0)
    products = hf.hvp(found.loss, mode="difference")(found.params, found.batch)(vectors)
    expected = rows(vectors) @ dense_hessian(name)
    assert relative_error(rows(products), expected) < TOLERANCE["difference"]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_FORWARD_MODE])
def test_forward_mode_equals_the_dense_hessian(name: str) -> None:
    found = case(name)
    product = matrix(hf.hvp(found.loss, mode="forward")(found.params, found.batch), found.params)
    assert relative_error(product.mT, product) < 1e-10
    if name not in OTHER_MASK_IN_FORWARD_MODE:
        assert relative_error(product, dense_hessian(name)) < 1e-8


@pytest.mark.parametrize(
    "layer",
    [
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4), dim=1),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_weight_norm_has_the_hessian_of_its_definition(layer: nn.Module, mode: Mode) -> None:
    layer = copy.deepcopy(layer).double()
    model_fn, params = hf.functional(nn.Sequential(layer, nn.Tanh()))
    batch = torch.randn(5, 3).double()

    def definition(p: Any, batch: Tensor) -> Tensor:
        g, v = (p[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
        weight = g * v / v.norm(dim=0 if g.shape[0] == 1 else 1, keepdim=True)
        return torch.tanh(batch @ weight.mT + p["0.bias"]).square().mean()

    def loss(p: Any, batch: Tensor) -> Tensor:
        return model_fn(p, batch).square().mean()

    found = matrix(hf.hvp(loss, mode=mode)(params, batch), params)
    assert relative_error(found, hessian(definition, params, batch)) < TOLERANCE[mode]


@pytest.mark.parametrize(("mode", "tolerance"), [("reverse", 1e-5), ("difference", 2e-3)])
def test_float32_products_are_near_those_of_float64(mode: Mode, tolerance: float) -> None:
    found = case("mlp")
    params = {name: leaf.float() for name, leaf in found.params.items()}
    x, y = found.batch
    product = matrix(hf.hvp(found.loss, mode=mode)(params, (x.float(), y)), params)
    assert product.dtype == torch.float32
    assert relative_error(product.double(), dense_hessian("mlp")) < tolerance


def test_a_linear_loss_has_the_zero_hessian() -> None:
    params = {"w": torch.ones(3)}
    for mode in MODES:
        matvec = hf.hvp(lambda p, _: p["w"].sum(), mode=mode)(params, None)
        assert torch.equal(matvec({"w": torch.ones(2, 3)})["w"], torch.zeros(2, 3))


def test_the_difference_of_a_zero_vector_is_zero() -> None:
    problem = closed_form("logistic regression")
    matvec = hf.hvp(problem.loss, mode="difference")(problem.params, problem.batch)
    assert matvec({"w": torch.zeros(1, 4).double()})["w"].eq(0).all()


def test_differences_work_at_zero_parameters() -> None:
    problem = closed_form("linear regression")
    zeros = {"w": torch.zeros_like(problem.params["w"])}
    found = matrix(hf.hvp(problem.loss, mode="difference")(zeros, problem.batch), zeros)
    assert relative_error(found, problem.hessian) < 1e-6


def test_any_tree_of_parameters_will_do() -> None:
    params = [torch.tensor(2.0).double(), (torch.tensor([3.0]).double(),)]
    matvec = hf.hvp(lambda p, _: p[0] ** 2 * p[1][0].sum())(params, None)
    assert matrix(matvec, params).tolist() == [[6.0, 4.0], [4.0, 0.0]]


@pytest.mark.parametrize("name", ["dropout", "bert, dropout"])
def test_dropout_draws_one_mask_for_all_products(name: str) -> None:
    found = case(name)
    v = hf.random_like(found.params, 3, seed=0)
    first = rows(hf.hvp(found.loss)(found.params, found.batch)(v))
    torch.manual_seed(17)
    again = rows(hf.hvp(found.loss)(found.params, found.batch)(v))
    assert relative_error(again, first) < 1e-10


# What is left behind


def state(model: nn.Module) -> dict[str, Any]:
    """All that a call could change of a module, and of torch's global state."""
    kept: dict[str, Any] = {"random stream": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        kept[f"parameter {name}"] = parameter.detach().clone()
        kept[f"gradient {name}"] = None if parameter.grad is None else parameter.grad.clone()
        kept[f"version {name}"] = parameter._version, parameter.requires_grad, id(parameter)
    for name, buffer in model.named_buffers():
        kept[f"buffer {name}"] = buffer.clone()
        kept[f"version {name}"] = buffer._version, id(buffer)
    for name, module in model.named_modules():
        kept[f"module {name}"] = module.training, sorted(module.__dict__)
        kept[f"hooks {name}"] = [
            list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")
        ]
    kept["global"] = (
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.get_default_dtype(),
    )
    return kept


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, entry by entry."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        assert same, key


@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
@pytest.mark.parametrize(
    "name", ["batch norm, train", "transformer encoder layer, dropout", "tied head", "frozen"]
)
def test_the_module_and_torch_stay_as_they_were(name: str, mode: Mode) -> None:
    found = case(name)
    for i, parameter in enumerate(found.model.parameters()):
        parameter.grad = torch.ones_like(parameter) if i else None
    found.model.register_forward_hook(lambda *_: None)
    before = state(found.model)
    assert torch.backends.mha.get_fastpath_enabled()
    matvec = hf.hvp(found.loss, mode=mode, chunk_size=2)(found.params, found.batch)
    out = matvec(hf.random_like(found.params, 3, seed=0))
    assert_same(state(found.model), before)
    assert not any(leaf.requires_grad for leaf in out.values())


def test_params_that_require_gradients_leave_no_graph_on_products_without_gradients() -> None:
    found = case("mlp")
    params = dict(found.model.named_parameters())
    with torch.no_grad():
        out = hf.hvp(found.loss)(params, found.batch)(hf.random_like(found.params, 5, seed=0))
    assert not any(leaf.requires_grad for leaf in out.values())
    assert all(parameter.grad is None for parameter in params.values())


def test_products_add_nothing_to_the_graph_and_it_dies_with_the_matvec() -> None:
    found = case("conv")
    v = hf.random_like(found.params, 2, seed=0)
    with counted_graphs() as graphs:
        matvec = hf.hvp(found.loss)(found.params, found.batch)
        before = len(graphs.alive)
        for _ in range(5):
            matvec(v)
        assert len(graphs.alive) == before > 0
        del matvec
        assert len(graphs.alive) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
@pytest.mark.parametrize("k", [1, 4])
def test_memory_after_80_products_is_that_after_20(mode: Mode, k: int) -> None:
    model = nn.Sequential(nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 100))
    model_fn, params = hf.functional(model)
    loss = hf.composed(model_fn, lambda out, _: out.square().mean())
    matvec = hf.hvp(loss, mode=mode, chunk_size=k)(params, torch.randn(8, 100))
    v = hf.random_like(params, k, seed=0)
    gc.disable()
    try:
        for _ in range(20):
            matvec(v)
        before = resident_bytes()
        for _ in range(60):
            matvec(v)
        one_product = 4 * hf.ravel(params).numel()
        assert resident_bytes() - before < 20 * one_product
    finally:
        gc.enable()


# What is refused


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"w": torch.ones(2, 3)}, "does not have the structure of the parameters"),
        ({"w": torch.ones(2, 4), "b": torch.ones(2)}, r"shape \(2, 4\), expected \(k, 3\)"),
        ({"w": torch.ones(3), "b": torch.tensor(1.0)}, "use `apply"),
        ({"w": torch.ones(2, 3, device="meta"), "b": torch.ones(2)}, "is on meta, expected cpu"),
    ],
)
def test_a_block_of_another_space_is_refused(block: Any, message: str, mode: Mode) -> None:
    params = {"w": torch.ones(3), "b": torch.tensor(1.0)}
    matvec = hf.hvp(lambda p, _: (p["w"] * p["b"]).square().sum(), mode=mode)(params, None)
    with pytest.raises(ValueError, match=message):
        matvec(block)


def hard_sigmoid(params: Any, x: Tensor) -> Tensor:
    """A loss through ``hardsigmoid``."""
    return F.hardsigmoid(x @ params["w"]).square().mean()


def embedding_bag(params: Any, x: Tensor) -> Tensor:
    """A loss through the maxima of ``embedding_bag``."""
    bags = F.embedding_bag(torch.tensor([[0, 1], [2, 1]]), params["w"], mode="max")
    return bags.exp().mean()


def ctc(params: Any, x: Tensor) -> Tensor:
    """A loss through ``ctc_loss``."""
    scores = torch.log_softmax((x @ params["w"])[:, None, :], dim=-1)
    return F.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([len(x)]), torch.tensor([2]))


@pytest.mark.parametrize(
    ("loss", "operation"),
    [(hard_sigmoid, "hardsigmoid"), (embedding_bag, "_embedding_bag"), (ctc, "_ctc_loss")],
)
@pytest.mark.parametrize("mode", ["reverse", "auto"])
def test_an_operation_without_second_derivative_is_named(
    loss: Any, operation: str, mode: Mode
) -> None:
    params, batch = {"w": torch.randn(4, 3).double()}, torch.randn(6, 4).double()
    fix = rf"{operation} has no second derivative.*`hvp\(loss, mode='difference'\)`"
    with pytest.raises(NotImplementedError, match=fix):
        matrix(hf.hvp(loss, mode=mode)(params, batch), params)


@pytest.mark.parametrize("loss", [hard_sigmoid, embedding_bag, ctc])
def test_differences_do_without_second_derivatives(loss: Any) -> None:
    params, batch = {"w": torch.randn(4, 3).double()}, torch.randn(6, 4).double()
    found = matrix(hf.hvp(loss, mode="difference")(params, batch), params)
    eps, steps = 1e-5, block_like(params, torch.eye(12, dtype=torch.float64))["w"]
    ahead, behind = (
        torch.stack([gradient(loss, {"w": params["w"] + s * v}, batch) for v in steps])
        for s in (eps, -eps)
    )
    assert relative_error(found, (ahead - behind) / (2 * eps)) < 1e-6


def sampled_grid(params: Any, x: Tensor) -> Tensor:
    """A loss through ``grid_sample``."""
    grid = torch.tanh(x @ params["w"])[None, :, None, :2]
    image = torch.linspace(0, 1, 25).double().square().view(1, 1, 5, 5)
    return F.grid_sample(image, grid, align_corners=False).square().sum()


def checkpointed(params: Any, x: Tensor) -> Tensor:
    """A loss whose activations are made again in the backward pass."""
    return torch.utils.checkpoint.checkpoint(
        lambda w: torch.tanh(x @ w).square().mean(), params["w"], use_reentrant=False
    )


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (sampled_grid, "grid_sampler_2d"),
        (checkpointed, "saved tensor hooks"),
    ],
    ids=["grid sample", "checkpoint"],
)
def test_what_forward_mode_cannot_do_is_named_and_reverse_can(
    loss: Any, named: str, k: int
) -> None:
    params, batch = {"w": torch.randn(4, 3).double()}, torch.randn(6, 4).double()
    with pytest.raises(NotImplementedError, match=rf"{named}.*use `hvp\(loss, mode='reverse'\)`"):
        hf.hvp(loss, mode="forward")(params, batch)(hf.random_like(params, k, seed=0))
    found = matrix(hf.hvp(loss, mode="reverse")(params, batch), params)
    assert relative_error(found, hessian(loss, params, batch)) < 1e-8


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='backward': choose 'reverse', 'forward'"):
        hf.hvp(torch.sum, mode="backward")  # type: ignore[arg-type]


def test_errors_of_the_users_own_loss_come_through_and_leave_torch_as_it_was() -> None:
    def loss(params: Any, batch: Any) -> Tensor:
        torch.rand(1)
        raise RuntimeError("my own")

    before = state(nn.Identity())
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="^my own$"):
        hf.hvp(loss)({"w": torch.ones(2)}, None)
    assert_same(state(nn.Identity()), before)


@pytest.mark.parametrize(
    ("loss", "operation"), [(embedding_bag, "embedding_bag"), (ctc, "ctc_loss")]
)
@pytest.mark.parametrize("k", [1, 5])
def test_forward_mode_advises_what_works(loss: Any, operation: str, k: int) -> None:
    params, batch = {"w": torch.randn(4, 3).double()}, torch.randn(6, 4).double()
    vectors = hf.random_like(params, k, seed=0)
    advice = rf"{operation}\w* has no second derivative in torch, in forward or.*mode='difference'"
    with pytest.raises(NotImplementedError, match=advice):
        hf.hvp(loss, mode="forward")(params, batch)(vectors)
    hf.hvp(loss, mode="difference")(params, batch)(vectors)


def test_forward_mode_advises_reverse_mode_where_that_works() -> None:
    params, batch = {"w": torch.randn(4, 3).double()}, torch.randn(6, 4).double()
    vector = hf.random_like(params, 1, seed=0)
    with pytest.raises(NotImplementedError, match=r"use `hvp\(loss, mode='reverse'\)`"):
        hf.hvp(sampled_grid, mode="forward")(params, batch)(vector)
    hf.hvp(sampled_grid, mode="reverse")(params, batch)(vector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_of_a_model_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.ones(5, 3), torch.arange(5) % 2
    model_fn, params = hf.functional(model, dtype=dtype)
    loss = hf.supervised(model_fn, F.cross_entropy)
    with pytest.raises(ValueError, match=f"computes in {dtype}, whose rounding hides finite"):
        hf.hvp(loss, mode="difference")(params, batch)
    model_fn, params = hf.functional(model)
    exact = hf.supervised(lambda p, x: model_fn(p, x.double().float()), F.cross_entropy)
    hf.hvp(exact, mode="difference")(params, batch)(hf.random_like(params, 1, seed=0))


def test_forward_mode_frees_one_graph_and_records_none() -> None:
    found = case("conv")
    v = hf.random_like(found.params, 1, seed=0)
    matvec = hf.hvp(found.loss, mode="forward")(found.params, found.batch)
    names, leaves = zip(*found.params.items(), strict=True)

    def value(*leaves: Tensor) -> Tensor:
        return found.loss(dict(zip(names, leaves, strict=True)), found.batch)

    gradient = torch.func.grad(value, argnums=tuple(range(len(leaves))))
    peaks = []
    for product in (
        lambda: matvec(v),
        lambda: torch.func.jvp(gradient, leaves, tuple(v[name][0] for name in names)),
    ):
        with Footprint() as memory:
            product()
        peaks.append(memory.peak)
    assert peaks[0] < 0.8 * peaks[1]


@pytest.mark.parametrize("layer", [nn.SiLU(), nn.Mish(), nn.GroupNorm(2, 4)], ids=str)
def test_forward_mode_of_backward_passes_that_must_be_recorded(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    v = hf.random_like(params, 2, seed=0)
    forward, reverse = (
        rows(hf.hvp(loss, mode=mode)(params, batch)(v)) for mode in ("forward", "reverse")
    )
    assert relative_error(forward, reverse) < 1e-10


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        torch.det,
        torch.logdet,
        lambda A: torch.linalg.slogdet(A)[1].square(),
        lambda A: torch.linalg.solve(A, torch.ones(3, dtype=torch.float64)).square().sum(),
        lambda A: torch.linalg.tensorsolve(A, torch.ones(3, dtype=torch.float64)).pow(3).sum(),
    ],
)
def test_forward_mode_follows_the_factors_of_a_matrix(function: Any, recompute: bool) -> None:
    A = 3 * torch.eye(3, dtype=torch.float64) + torch.arange(9.0).double().view(3, 3).sin()
    of = hf.recomputed(lambda A: function(A).clone()) if recompute else function
    found = matrix(hf.hvp(lambda p, b: of(p["A"]), mode="forward")({"A": A}, None), {"A": A})
    expected = torch.autograd.functional.hessian(function, A).view(9, 9)
    assert relative_error(found, expected) < 1e-12


class _Projected(nn.Module):
    """Layer that projects its weight onto the unit ball before use."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.weight, self.write = nn.Parameter(torch.ones(3, 4).double().cumsum(1)), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.weight)
        return (x @ self.weight.mT).tanh()


def _clamps(weight: Tensor) -> None:
    with torch.no_grad():
        weight.clamp_(-2.0, 2.0)


def _replaces(weight: Tensor) -> None:
    weight.data = nn.functional.normalize(weight.data)


@pytest.mark.parametrize("write", [_clamps, _replaces])
def test_differences_do_not_follow_a_loss_that_writes_into_its_parameters(write: Any) -> None:
    model = _Projected(write)
    before = model.weight.detach().clone()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.mse_loss)
    batch = torch.ones(2, 4).double() / 5, torch.zeros(2, 3).double()
    with pytest.raises(NotImplementedError, match=r"writes into its parameters.*'reverse'"):
        hf.hvp(loss, mode="difference")(params, batch)
    # Autograd takes the written values for the parameters.
    written = nn.Parameter(before.clone())
    write(written)
    at = {"weight": written.detach()}
    expected = hessian(lambda p, b: (b[0] @ p["weight"].mT).tanh().square().mean(), at, batch)
    found = matrix(hf.hvp(loss)(params, batch), params)
    assert relative_error(found, expected) < 1e-10
    assert torch.equal(model.weight, before)


def test_differences_do_not_follow_transforms_inside_of_the_loss() -> None:
    def loss(p: Any, _: Any) -> Tensor:
        slope = torch.func.jvp(lambda x: (p["w"] * x).sin(), (X,), (X,))[1]
        return slope.square().mean()

    X = torch.linspace(0.3, 1.0, 4).double()
    params = {"w": X.cos()}
    with pytest.raises(NotImplementedError, match=r"transforms of torch.func.*mode='reverse'"):
        hf.hvp(loss, mode="difference")(params, None)
    expected = hessian(lambda p, _: (p["w"] * X * (p["w"] * X).cos()).square().mean(), params, None)
    assert relative_error(matrix(hf.hvp(loss)(params, None), params), expected) < 1e-10


def test_a_gradient_penalty_by_requires_grad_has_no_forward_mode() -> None:
    def loss(p: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        slope = torch.autograd.grad((x @ p["w"]).sin().sum(), x, create_graph=True)[0]
        return slope.square().mean()

    params, x = {"w": torch.linspace(0.1, 0.9, 4).double()}, torch.eye(4).double()
    matvec = hf.hvp(loss, mode="forward")
    with pytest.raises(NotImplementedError, match=r"calls `requires_grad_\(\)`.*'reverse'"):
        matrix(matvec(params, x), params)


def test_a_complex_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the loss is complex: return its real part"):
        hf.hvp(lambda p, _: (p["w"] + 1j).square().sum())({"w": torch.ones(2)}, None)
