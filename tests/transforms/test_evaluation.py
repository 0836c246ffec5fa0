"""Losses that have no Hessian, and matvecs that keep their parameters."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf

Mode = Literal["reverse", "forward", "difference", "auto"]
MODES: tuple[Mode, ...] = ("reverse", "forward", "difference", "auto")


def squares(params: Any, batch: Any) -> Tensor:
    """A loss of anything."""
    return params["w"].square().sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("loss", "params", "error", "message"),
    [
        (
            squares,
            {"u": torch.ones(2), "w": torch.tensor([1.0, float("nan")])},
            ValueError,
            "parameter 'w' has entries that are NaN or infinite",
        ),
        (
            lambda p, _: p["w"].sum() * float("nan"),
            {"w": torch.ones(2)},
            ValueError,
            "the loss is nan at finite parameters: check the batch",
        ),
        (
            lambda p, _: -p["w"].prod().log(),
            {"w": torch.zeros(2)},
            ValueError,
            "the loss is inf at finite parameters",
        ),
        (
            squares,
            {"w": torch.ones(2, dtype=torch.int64)},
            TypeError,
            "'w' has dtype torch.int64; curvature needs real floating-point leaves",
        ),
        (
            lambda p, _: p["w"] ** 2,
            {"w": torch.ones(3)},
            ValueError,
            r"the loss must be a scalar tensor, not of shape \(3,\): return its mean",
        ),
        (
            lambda p, _: 1.0,
            {"w": torch.ones(3)},
            ValueError,
            "the loss must be a scalar tensor, not a float$",
        ),
        (
            lambda p, _: None,
            {"w": torch.ones(3)},
            ValueError,
            "the loss must be a scalar tensor, not a NoneType$",
        ),
        (
            squares,
            {"w": torch.ones(2), "b": torch.ones(2, device="meta")},
            ValueError,
            "leaves lie on several devices",
        ),
        (squares, {}, ValueError, "the tree has no leaf"),
    ],
)
def test_what_has_no_hessian_is_refused(
    loss: Any, params: Any, error: type[Exception], message: str, mode: Mode
) -> None:
    with pytest.raises(error, match=message):
        hf.hvp(loss, mode=mode)(params, None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: nn.Linear(3, 1)(x).mean(),
        lambda p, x: (p["w"].detach() * x).sum(),
        torch.no_grad()(lambda p, x: (p["w"] * x).sum()),
    ],
    ids=["of the module", "detached", "no_grad"],
)
def test_a_loss_that_does_not_depend_on_params_is_refused(loss: Any, mode: Mode) -> None:
    with pytest.raises(ValueError, match="the loss does not depend on params"):
        hf.hvp(loss, mode=mode)({"w": torch.ones(3)}, torch.ones(2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_on_another_device_is_refused(mode: Mode) -> None:
    model_fn, params = hf.functional(nn.Linear(3, 2))
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = torch.ones(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="parameters are on cpu, but the batch has tensors on meta"
    ):
        hf.hvp(loss, mode=mode)(params, batch)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_changed_since_are_refused(mode: Mode) -> None:
    model = nn.Linear(3, 2)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, lambda out, y: (out - y).square().mean())
    batch = torch.ones(2, 3), torch.zeros(2, 2)
    matvec = hf.hvp(loss, mode=mode)(params, batch)
    v = hf.random_like(params, 2, seed=0)
    matvec(v)
    loss(dict(model.named_parameters()), batch).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="'weight' has changed in place since this matvec"):
        matvec(v)
    hf.hvp(loss, mode=mode)(params, batch)(v)
