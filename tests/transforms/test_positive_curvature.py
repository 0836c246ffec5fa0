from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import CalledTwice, Residual, case, dense_hessian, randn
from tests.reference import (
    block_diagonal,
    gauss_newton,
    hessian,
    matrix,
    relative_error,
)
from tests.reference.backpropagation import positive_curvature

Kind = Literal["abs", "clip", "zero", "none"]


KINDS: tuple[Kind, ...] = ("abs", "clip", "zero", "none")


# Elementwise activations and normalisations that are linear, on several architectures.
NETS = ("mlp", "conv", "batch norm, eval", "dropout", "frozen", "tuple inputs", "mse loss")


Params = dict[str, Tensor]


@dataclass(frozen=True)
class Net:
    """A net that shows what each activation reads, and moves what each gives by an offset."""

    forward: Callable[[Params, Tensor, Callable[[Tensor], Tensor]], Tensor]
    activation: Callable[[Tensor], Tensor]
    params: Params
    batch: tuple[Tensor, Tensor]

    @property
    def loss(self) -> hf.Loss:
        return hf.supervised(lambda p, x: self.forward(p, x, self.activation), F.cross_entropy)

    def read(self, params: Params, x: Tensor) -> list[Tensor]:
        """What the activations read."""
        found = []

        def activation(a: Tensor) -> Tensor:
            found.append(a)
            return self.activation(a)

        self.forward(params, x, activation)
        return found

    def moved(self, offsets: Sequence[Tensor], x: Tensor) -> Tensor:
        """The outputs with the activations moved by offsets."""
        left = iter(offsets)
        return self.forward(self.params, x, lambda a: self.activation(a) + next(left))


def mlp_of(activation: Callable[[Tensor], Tensor]) -> Net:
    def forward(p: Params, x: Tensor, phi: Any) -> Tensor:
        return phi(phi(x @ p["u"] + p["c"]) @ p["v"]) @ p["w"]

    params = {"u": randn(3, 4), "c": randn(4), "v": randn(4, 4), "w": randn(4, 3)}
    return Net(forward, activation, params, (randn(6, 3), torch.arange(6) % 3))


def residual_of(activation: Callable[[Tensor], Tensor]) -> Net:
    def forward(p: Params, x: Tensor, phi: Any) -> Tensor:
        h = x + phi(x @ p["u"]) @ p["v"]
        h = h + phi(h @ p["w"])
        return phi(h) @ p["z"]

    params = {"u": randn(3, 4), "v": randn(4, 3), "w": randn(3, 3), "z": randn(3, 2)}
    return Net(forward, activation, params, (randn(5, 3), torch.arange(5) % 2))


def conv_of(activation: Callable[[Tensor], Tensor]) -> Net:
    def forward(p: Params, x: Tensor, phi: Any) -> Tensor:
        h = phi(F.conv2d(x, p["first"], p["bias"], padding=1))
        return phi(F.conv2d(F.avg_pool2d(h, 2), p["second"])).flatten(1) @ p["head"]

    params = {
        "first": randn(2, 1, 3, 3),
        "bias": randn(2),
        "second": randn(2, 2, 2, 2),
        "head": randn(2, 3),
    }
    return Net(forward, activation, params, (randn(4, 1, 4, 4), torch.arange(4) % 3))


def layer_norm(a: Tensor) -> Tensor:
    return F.layer_norm(a, a.shape[-1:])


def softmax(a: Tensor) -> Tensor:
    return 3 * torch.softmax(a, -1)


REFERENCES: dict[str, Callable[[], Net]] = {
    "sigmoid mlp": lambda: mlp_of(torch.sigmoid),
    "silu mlp": lambda: mlp_of(F.silu),
    "tanh residual": lambda: residual_of(torch.tanh),
    "square residual": lambda: residual_of(torch.square),
    "gelu conv": lambda: conv_of(F.gelu),
    "softplus conv": lambda: conv_of(F.softplus),
    "layer norm residual": lambda: residual_of(layer_norm),
    "softmax mlp": lambda: mlp_of(softmax),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_reference_by_example(name: str, kind: Kind) -> None:
    net = REFERENCES[name]()
    found = matrix(hf.pchvp(net.loss, residual=kind)(net.params, net.batch), net.params)
    assert relative_error(found, positive_curvature(net, kind)) < 1e-8


@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_without_replacement_is_the_hessians_blocks(name: str) -> None:
    net = REFERENCES[name]()
    expected = block_diagonal(hessian(net.loss, net.params, net.batch), net.params)
    assert relative_error(positive_curvature(net, "none"), expected) < 1e-8


@pytest.mark.parametrize("kind", ["abs", "clip"])
@pytest.mark.parametrize("name", ["sigmoid mlp", "tanh residual", "gelu conv"])
def test_kinds_differ_where_activations_curve(name: str, kind: Kind) -> None:
    net = REFERENCES[name]()
    kinds = [
        matrix(hf.pchvp(net.loss, residual=r)(net.params, net.batch), net.params)
        for r in (kind, "zero", "none")
    ]
    assert relative_error(kinds[0], kinds[1]) > 1e-3
    assert relative_error(kinds[0], kinds[2]) > 1e-3


@pytest.mark.parametrize("name", NETS)
def test_none_is_the_hessians_diagonal_blocks(name: str) -> None:
    found = case(name)
    product = matrix(hf.pchvp(found.loss, residual="none")(found.params, found.batch), found.params)
    expected = block_diagonal(dense_hessian(name), found.params)
    assert relative_error(product, expected) < 1e-8


@pytest.mark.parametrize("name", [*NETS, "scaled dot product attention", "residual", "tied head"])
def test_zero_is_the_ggns_diagonal_blocks(name: str) -> None:
    found = case(name)
    product = matrix(hf.pchvp(found.loss, residual="zero")(found.params, found.batch), found.params)
    ggn = gauss_newton(found.loss, found.params, found.batch)
    assert relative_error(product, block_diagonal(ggn, found.params)) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_off_the_blocks(kind: Kind) -> None:
    found = case("conv")
    product = matrix(hf.pchvp(found.loss, residual=kind)(found.params, found.batch), found.params)
    assert torch.equal(product, block_diagonal(product, found.params))


@pytest.mark.parametrize("kind", ["abs", "clip", "zero"])
@pytest.mark.parametrize("name", ["sigmoid mlp", "layer norm residual", "gelu conv"])
def test_smallest_eigenvalue_is_not_negative(name: str, kind: Kind) -> None:
    net = REFERENCES[name]()
    product = matrix(hf.pchvp(net.loss, residual=kind)(net.params, net.batch), net.params)
    assert relative_error(product.mT, product) < 1e-10
    values = torch.linalg.eigvalsh((product + product.mT) / 2)
    assert values[0] >= -1e-10 * values[-1]
    if kind == "abs":
        exact = matrix(hf.pchvp(net.loss, residual="none")(net.params, net.batch), net.params)
        values = torch.linalg.eigvalsh(product - exact)
        assert values[0] >= -1e-10 * values[-1]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(
            nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3), nn.LeakyReLU(), nn.Linear(3, 3)
        ),
        nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2).eval(),
            nn.MaxPool2d(2),
            Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1))),
            nn.Hardtanh(),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
    ],
    ids=["mlp", "residual conv"],
)
def test_all_kinds_are_equal_where_every_module_is_piecewise_linear(model: nn.Module) -> None:
    model_fn, params = hf.functional(model.double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = randn(5, 16), torch.arange(5) % 3
    ggn = block_diagonal(gauss_newton(loss, params, batch), params)
    for kind in KINDS:
        found = matrix(hf.pchvp(loss, residual=kind)(params, batch), params)
        assert relative_error(found, ggn) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_unequal_size_give_the_mean_over_examples(kind: Kind) -> None:
    net = conv_of(torch.tanh)
    x, y = net.batch
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    matvec = hf.over_batches(hf.pchvp(net.loss, residual=kind))(net.params, batches)
    assert relative_error(matrix(matvec, net.params), positive_curvature(net, kind)) < 1e-8


def test_modules_and_functions_of_one_net_give_the_same() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)).double()
    model_fn, params = hf.functional(model)
    batch = randn(5, 3), torch.arange(5) % 3
    first = matrix(hf.pchvp(hf.supervised(model_fn, F.cross_entropy))(params, batch), params)
    plain = hf.supervised(
        lambda p, x: F.linear(
            F.silu(F.linear(x, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"]
        ),
        F.cross_entropy,
    )
    assert relative_error(matrix(hf.pchvp(plain)(params, batch), params), first) < 1e-12


def test_float32_products_are_near_those_of_float64() -> None:
    net = conv_of(F.gelu)
    params = {name: leaf.float() for name, leaf in net.params.items()}
    batch = net.batch[0].float(), net.batch[1]
    found = matrix(hf.pchvp(net.loss)(params, batch), params)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), positive_curvature(net, "abs")) < 1e-4


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_products_do_not_depend_on_how_a_block_is_cut(chunk_size: int) -> None:
    net = mlp_of(torch.tanh)
    matvec = hf.pchvp(net.loss, chunk_size=chunk_size)(net.params, net.batch)
    assert relative_error(matrix(matvec, net.params), positive_curvature(net, "abs")) < 1e-8


# What is refused


class Gate(nn.Module):
    """A product of two functions of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.head(F.silu(self.first(hidden)) * self.second(hidden))


@pytest.mark.parametrize("kind", ["abs", "clip", "none"])
@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 3)), "other than.*Glu"),
        (nn.Sequential(nn.Linear(3, 4), nn.Softsign(), nn.Linear(4, 3)), "Div combines two"),
    ],
    ids=["unknown function", "several operations"],
)
def test_another_nonlinearity_is_refused_by_name(model: nn.Module, named: str, kind: Kind) -> None:
    model_fn, params = hf.functional(model.double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = randn(5, 3), torch.arange(5) % 3
    with pytest.raises(NotImplementedError, match=f"{named}.*residual='zero'"):
        hf.pchvp(loss, residual=kind)(params, batch)
    ggn = block_diagonal(gauss_newton(loss, params, batch), params)
    found = matrix(hf.pchvp(loss, residual="zero")(params, batch), params)
    assert relative_error(found, ggn) < 1e-8


@pytest.mark.parametrize(
    "of",
    [
        *("scaled dot product attention", "multi-head attention", "transformer encoder layer"),
        *("lstm", "gpt2"),
    ],
)
def test_attention_and_gates_have_the_hessians_blocks(of: str) -> None:
    found = case(of)
    kinds = ("none", "clip", "abs")
    exact, positive, absolute = (
        matrix(hf.pchvp(found.loss, residual=kind)(found.params, found.batch), found.params)
        for kind in kinds
    )
    expected = block_diagonal(hessian(found.loss, found.params, found.batch), found.params)
    assert relative_error(exact, expected) < 1e-8
    assert relative_error(absolute, 2 * positive - exact) < 1e-8
    for definite in (positive, absolute):
        values = torch.linalg.eigvalsh((definite + definite.mT) / 2)
        assert values.min() > -1e-10 * values.max()


@pytest.mark.parametrize("model", [Gate, CalledTwice], ids=["gate", "called twice"])
def test_products_of_two_functions_of_a_parameter(model: Any) -> None:
    model_fn, params = hf.functional(model().double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = randn(5, 3), torch.arange(5) % 3
    expected = block_diagonal(hessian(loss, params, batch), params)
    product = hf.pchvp(loss, residual="none")(params, batch)
    assert relative_error(matrix(product, params), expected) < 1e-8
    positive = matrix(hf.pchvp(loss, residual="clip")(params, batch), params)
    assert torch.linalg.eigvalsh(positive).min() > -1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_changed_since_are_refused(kind: Kind) -> None:
    net = mlp_of(torch.tanh)
    matvec = hf.pchvp(net.loss, residual=kind)(net.params, net.batch)
    net.params["v"].add_(1)
    with pytest.raises(RuntimeError, match="'v' has changed in place since this matvec"):
        matvec(hf.random_like(net.params, 1, seed=0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_does_not_depend_on_params_is_refused(kind: Kind) -> None:
    loss = hf.supervised(lambda p, x: x, F.cross_entropy)
    with pytest.raises(ValueError, match="the loss does not depend on params"):
        hf.pchvp(loss, residual=kind)(
            {"w": torch.ones(3)}, (torch.ones(2, 3), torch.tensor([0, 1]))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_is_refused(kind: Kind) -> None:
    net = mlp_of(torch.tanh)
    batch = net.batch[0], torch.full((6,), -100)
    with pytest.raises(ValueError, match="the loss is nan at finite parameters"):
        hf.pchvp(net.loss, residual=kind)(net.params, batch)


def test_a_loss_without_its_halves_is_refused() -> None:
    with pytest.raises(TypeError, match=r"pass `supervised\(model_fn, criterion\)`"):
        hf.pchvp(lambda p, _: p["w"].sum())  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="residual='negative': choose 'abs', 'clip'"):
        hf.pchvp(mlp_of(torch.tanh).loss, residual="negative")  # type: ignore[arg-type]
