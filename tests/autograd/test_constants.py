"""Values that autograd takes for constant stay so in differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.reference import hessian, matrix, relative_error

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 1, 0])


# One definition: autograd's.


def no_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.tanh(h).mean(1, keepdim=True)
    return h * scale


def no_grad_in_place(h: Tensor) -> Tensor:
    kept = torch.zeros_like(h)
    with torch.no_grad():
        kept.copy_(2 * h)
        kept[0] = h[0]
        kept.mul_(h)
    return h * kept


def inference(h: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = h.mean().clone()
    return h * scale.clone()


def adversarial(h: Tensor) -> Tensor:
    return h + torch.autograd.grad((h**3).sum(), h)[0] if h.requires_grad else h


CUT: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda h: h + h.detach() * h,
    "data": lambda h: h + h.data * h,
    "item": lambda h: h * h.sum().item(),
    "numpy": lambda h: h * torch.from_numpy(np.tanh(h.detach().numpy())),
    "straight through": lambda h: h + (torch.round(4 * h) / 4 - h).detach(),
    "no_grad": no_grad,
    "no_grad, in place": no_grad_in_place,
    "inference mode": inference,
    "adversarial": adversarial,
    "gumbel softmax": lambda h: F.gumbel_softmax(h, hard=True) * h,
    "dropout": lambda h: F.dropout(h, 0.3, training=True),
    "glu": lambda h: F.glu(torch.cat([h, 2 * h], 1)),
}


@pytest.mark.parametrize(("mode", "tolerance"), [("forward", 1e-10), ("difference", 1e-6)])
@pytest.mark.parametrize("name", CUT)
def test_what_autograd_takes_for_constant_is_so_in_every_mode(
    name: str, mode: Any, tolerance: float
) -> None:
    def loss(params: Any, _: Any) -> Tensor:
        return F.cross_entropy(CUT[name](torch.tanh(X @ params["w"])) @ params["v"], Y)

    params = {
        "w": torch.randn(3, 5, dtype=torch.float64),
        "v": torch.randn(5, 4, dtype=torch.float64),
    }
    expected = matrix(hf.hvp(loss, mode="reverse")(params, None), params)
    if name not in ("dropout", "gumbel softmax"):
        # Random ones draw from a seed of their own.
        assert relative_error(expected, hessian(loss, params, None)) < 1e-10
    matvec = hf.hvp(loss, mode=mode)(params, None)
    if name == "numpy" and mode == "forward":
        with pytest.raises(NotImplementedError, match=r"leaves torch.*mode='reverse'"):
            matvec(hf.random_like(params, 1, seed=0))
        return
    assert relative_error(matrix(matvec, params), expected) < tolerance


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_numbers_of_python_are_constant_in_differences() -> None:
    def loss(params: Any, _: Any) -> Tensor:
        hidden = torch.tanh(X @ params["w"])
        return (hidden * float(hidden.sum())).square().mean()

    params = {"w": torch.randn(3, 4, dtype=torch.float64)}
    found = matrix(hf.hvp(loss, mode="difference")(params, None), params)
    assert relative_error(found, matrix(hf.hvp(loss)(params, None), params)) < 1e-6


def test_another_path_at_moved_parameters_is_refused() -> None:
    calls = []

    def loss(params: Any, _: Any) -> Tensor:
        calls.append(1)
        value = params["w"].square().sum()
        return value * value.detach() if len(calls) < 3 else value

    params = {"w": torch.randn(3, dtype=torch.float64)}
    matvec = hf.hvp(loss, mode="difference")(params, None)
    with pytest.raises(RuntimeError, match=r"takes another path.*mode='reverse'"):
        matvec(hf.random_like(params, 1, seed=0))


TOKENS = torch.tensor([[0, 1], [3, 0], [2, 4]])


def test_by_backward_keeps_constants_too() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    model_fn, params = hf.functional(model)
    batch = TOKENS, torch.tensor([0, 1, 1])
    expected = matrix(hf.hvp(hf.supervised(model_fn, F.cross_entropy))(params, batch), params)
    own = dict(model.named_parameters())
    matvec = hf.hvp_by_backward(model, lambda b: F.cross_entropy(model(b[0]), b[1]))(own, batch)
    assert relative_error(matrix(matvec, own), expected) < 1e-6
