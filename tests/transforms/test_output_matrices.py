import functools
import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.output_gradients import NotConvexWarning
from tests.reference import gauss_newton, gradient, hessian, matrix, relative_error
from tests.transforms.problem import CURVATURES, net


class TwoHeads(nn.Module):
    """Logits and a regression, as a tuple or a dict, beside what has no gradient."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.named = named

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        left, right = self.left(hidden), self.right(hidden)
        constant, places = torch.ones(2).double(), left.argmax(1)
        if self.named:
            return {"right": right, "left": left, "constant": constant, "places": places}
        return left, right, constant, places


@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
def test_outputs_may_be_any_tree(named: bool) -> None:
    model_fn, params = hf.functional(TwoHeads(named=named).double())
    keys = ("left", "right", "constant") if named else (0, 1, 2)

    def criterion(outputs: Any, batch: Any) -> Tensor:
        left, right, constant = (outputs[key] for key in keys)
        return F.cross_entropy(left, batch["y"]) + (constant * right).square().mean()

    loss = hf.composed(lambda p, batch: model_fn(p, batch["x"]), criterion)
    batch = {"x": torch.randn(5, 3).double(), "y": torch.randint(3, (5,))}
    # What has no gradient is no part of the definition.
    floating = hf.composed(
        lambda p, batch: [loss.outputs(p, batch)[key] for key in keys[:2]],
        lambda out, batch: F.cross_entropy(out[0], batch["y"]) + out[1].square().mean(),
    )
    expected = gauss_newton(floating, params, batch)
    assert relative_error(matrix(hf.ggnvp(loss)(params, batch), params), expected) < 1e-8
    per_example = sum(
        g.outer(g)
        for g in (
            gradient(floating, params, {"x": x[None], "y": y[None]})
            for x, y in zip(batch["x"], batch["y"], strict=True)
        )
    )
    found = matrix(hf.efvp(loss)(params, batch), params)
    assert relative_error(found, per_example / 5) < 1e-8


@dataclass
class Heads:
    left: Tensor
    right: Any


HIDDEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "namespace": lambda left, right: (SimpleNamespace(left=left), right),
    "nested": lambda left, right: SimpleNamespace(all=[{"left": left}, Heads(right, None)]),
    "data class": Heads,
    "distribution": lambda left, right: (torch.distributions.Normal(left, right.exp()), None),
    "mapping": lambda left, right: UserDict(left=left, right=right),
}
SEEN: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "namespace": lambda out: (out[0].left, out[1]),
    "nested": lambda out: (out.all[0]["left"], out.all[1].left),
    "data class": lambda out: (out.left, out.right),
    "distribution": lambda out: (out[0].loc, out[0].scale),
    "mapping": lambda out: (out["left"], out["right"]),
}


@pytest.mark.parametrize("of", ["ggnvp", "efvp", "functional", "pchvp"])
@pytest.mark.parametrize("name", HIDDEN)
def test_outputs_in_objects_count(name: str, of: str) -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    params = {key: torch.randn(3, 3, dtype=torch.float64) for key in ("a", "b")}

    def heads(params: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return batch[0] @ params["a"], torch.tanh(batch[0] @ params["b"])

    def likelihood(mean: Tensor, size: Tensor, y: Tensor) -> Tensor:
        return ((mean - y).square() * (1 + size.square())).mean()

    def hidden(out: Any, y: Tensor) -> Tensor:
        return likelihood(*SEEN[name](out), y)

    loss = hf.composed(lambda p, b: HIDDEN[name](*heads(p, b)), hidden, targets=lambda b: b[1])
    scaled = (lambda t: t.exp()) if name == "distribution" else (lambda t: t)
    plain = hf.composed(
        lambda p, b: [heads(p, b)[0], scaled(heads(p, b)[1])],
        lambda out, b: likelihood(*out, b[1]),
    )
    G, H = gauss_newton(plain, params, (x, y)), hessian(plain, params, (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvexWarning)
        if of == "ggnvp":
            found, right = matrix(hf.ggnvp(loss)(params, (x, y)), params), G
        elif of == "functional":
            found, right = matrix(hf.functional_hvp(loss)(params, (x, y)), params), H - G
        elif of == "pchvp":
            found = matrix(hf.pchvp(loss, residual="zero")(params, (x, y)), params)
            right = torch.block_diag(G[:9, :9], G[9:, 9:])
        else:
            each = [gradient(plain, params, (x[i : i + 1], y[i : i + 1])) for i in range(5)]
            found = matrix(hf.efvp(loss)(params, (x, y)), params)
            right = sum(g.outer(g) for g in each) / 5
    assert relative_error(found, right) < 1e-8


@pytest.mark.parametrize("of", ["ggnvp", "efvp", "functional_hvp"])
def test_outputs_that_cannot_be_reached_are_refused(of: str) -> None:
    def outputs(params: Any, x: Tensor) -> Any:
        z = x @ params["w"]
        return z, lambda: z.square()

    loss = hf.composed(outputs, lambda out, _: (out[0] * out[1]()).mean())
    with pytest.raises(TypeError, match=r"outputs\[1\] is a function that holds tensors"):
        getattr(hf, of)(loss)({"w": torch.randn(3, 2)}, torch.randn(4, 3))


@pytest.mark.parametrize("of", CURVATURES)
def test_a_loss_without_its_halves_is_refused(of: str) -> None:
    with pytest.raises(TypeError, match=r"pass `supervised\(model_fn, criterion\)`"):
        CURVATURES[of](lambda p, _: p["w"].sum())  # type: ignore[arg-type]


@pytest.mark.parametrize("of", CURVATURES)
def test_parameters_changed_since_are_refused(of: str) -> None:
    found = net(F.cross_entropy, torch.randint(3, (5,)))
    matvec = CURVATURES[of](found.loss)(found.params, found.batch)
    v = hf.random_like(found.params, 2, seed=0)
    matvec(v)
    with torch.no_grad():
        next(found.model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="'0.weight' has changed in place since this matvec"):
        matvec(v)


@pytest.mark.parametrize("of", CURVATURES)
def test_a_loss_that_is_not_finite_is_refused(of: str) -> None:
    found = net(F.cross_entropy, torch.full((5,), -100))
    with pytest.raises(ValueError, match="the loss is nan at finite parameters"):
        CURVATURES[of](found.loss)(found.params, found.batch)


@pytest.mark.parametrize("of", ["ggnvp", "efvp"])
def test_a_criterion_that_is_no_scalar_is_refused(of: str) -> None:
    found = net(functools.partial(F.cross_entropy, reduction="none"), torch.randint(3, (5,)))
    with pytest.raises(ValueError, match=r"must be a scalar tensor, not of shape \(5,\)"):
        CURVATURES[of](found.loss)(found.params, found.batch)


@pytest.mark.parametrize("of", ["ggnvp", "efvp"])
@pytest.mark.parametrize(
    "loss",
    [
        hf.composed(lambda p, x: x.exp(), lambda out, _: out.square().mean()),
        hf.composed(lambda p, x: p["w"] * x, lambda out, x: x.square().mean()),
        hf.composed(lambda p, x: p["w"].detach() * x, lambda out, x: out.square().mean()),
    ],
    ids=["model", "criterion", "detached"],
)
def test_a_loss_that_does_not_depend_on_params_is_refused(loss: hf.Loss, of: str) -> None:
    with pytest.raises(ValueError, match="depend"):
        CURVATURES[of](loss)({"w": torch.ones(3)}, torch.ones(3))
