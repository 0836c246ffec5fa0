import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import case
from tests.reference import gradient

H = torch.tensor([[3.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 0.1]]).double()
OTHER = torch.tensor([[1.0, 0.0, 0.3], [0.0, 2.0, 0.0], [0.3, 0.0, 4.0]]).double()
POINT = {"w": torch.tensor([1.0, -2.0, 3.0]).double()}


def quadratic(p: Any, A: Tensor) -> Tensor:
    return p["w"] @ A @ p["w"] / 2 + 7


def rayleigh(A: Tensor, direction: Tensor) -> float:
    """Twice over the step at which the quadratic is back at its value."""
    return float(direction @ A @ direction / (direction @ A @ POINT["w"]))


@pytest.mark.parametrize("start", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("rtol", [0.1, 1e-2, 1e-6])
def test_along_the_gradient_of_a_quadratic_it_is_the_rayleigh_quotient(
    rtol: float, start: float
) -> None:
    g = H @ POINT["w"]
    found = hf.critical_sharpness(quadratic, POINT, H, {"w": g}, rtol=rtol, start=start)
    expected = rayleigh(H, g)
    assert expected == pytest.approx(float(g @ H @ g / (g @ g)))
    assert found.value == pytest.approx(expected, rel=rtol)
    assert found.bounds[0] <= 2 / expected * (1 + 1e-12)
    assert found.bounds[1] >= 2 / expected * (1 - 1e-12)
    assert found.converged
    assert found.value == 2 / found.step


def test_it_is_at_most_the_largest_eigenvalue_and_reaches_it_along_its_vector() -> None:
    values, vectors = torch.linalg.eigh(H)
    of = partial(hf.critical_sharpness, quadratic, rtol=1e-8)
    assert of(POINT, H, {"w": H @ POINT["w"]}).value < values[-1]
    top = {"w": vectors[:, -1] * (vectors[:, -1] @ POINT["w"])}
    assert of(top, H, {"w": H @ top["w"]}).value == pytest.approx(float(values[-1]), rel=1e-6)


def test_along_another_losses_step_it_is_this_losses_curvature() -> None:
    step = OTHER @ POINT["w"]
    found = hf.critical_sharpness(quadratic, POINT, H, {"w": step}, rtol=1e-6)
    expected = step @ H @ step / (step @ (H @ POINT["w"]))
    assert found.value == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("by", [1e-3, 10.0])
def test_it_scales_inversely_with_the_direction(by: float) -> None:
    g = H @ POINT["w"]
    of = partial(hf.critical_sharpness, quadratic, rtol=1e-6)
    scaled = of(POINT, H, {"w": by * g})
    assert scaled.value == pytest.approx(by * of(POINT, H, {"w": g}).value, rel=1e-5)


def test_the_loss_of_a_net_rises_beyond_the_step_and_not_before() -> None:
    found = case("mlp")
    g = hf.unravel(gradient(found.loss, found.params, found.batch), found.params)

    def at(step: float) -> float:
        moved = {name: p - step * g[name] for name, p in found.params.items()}
        return float(found.loss(moved, found.batch))

    sharpness = hf.critical_sharpness(found.loss, found.params, found.batch, g, rtol=1e-6)
    assert at(sharpness.bounds[0]) <= at(0.0) < at(sharpness.bounds[1])


def test_the_number_of_forward_passes_is_counted_and_small() -> None:
    calls = []

    def counted(p: Any, A: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return quadratic(p, A)

    found = hf.critical_sharpness(counted, POINT, H, {"w": H @ POINT["w"]})
    assert found.evaluations == len(calls) <= 12
    assert not any(calls)


def test_params_stay_as_they_were() -> None:
    before = POINT["w"].clone()
    hf.critical_sharpness(quadratic, POINT, H, {"w": H @ POINT["w"]})
    assert torch.equal(POINT["w"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_of_ascent_is_infinitely_sharp(dtype: torch.dtype) -> None:
    point, A = {"w": POINT["w"].to(dtype)}, H.to(dtype)
    found = hf.critical_sharpness(quadratic, point, A, {"w": -A @ point["w"]})
    assert found.value == math.inf
    assert found.step == 0.0
    assert found.converged


@pytest.mark.parametrize(
    "loss",
    [lambda p, _: 0 * p["w"].sum() + 3.0, lambda p, _: p["w"].sum(), lambda p, _: -p["w"][2].abs()],
    ids=["flat", "falling", "falling, then constant"],
)
def test_a_loss_that_no_step_raises_has_none(loss: Any) -> None:
    direction = {"w": torch.tensor([1.0, 1.0, -1.0]).double()}
    found = hf.critical_sharpness(loss, POINT, None, direction)
    assert found.value == 0.0
    assert found.step == math.inf
    assert found.bounds[1] == math.inf
    assert found.converged


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_a_loss_that_is_no_longer_finite_has_risen(beyond: float) -> None:
    def loss(p: Any, _: Any) -> Tensor:
        return -p["w"].sum() if p["w"][0] < 1.25 else torch.tensor(beyond)

    direction = {"w": torch.tensor([-1.0, 0.0, 0.0]).double()}
    found = hf.critical_sharpness(loss, {"w": torch.ones(3)}, None, direction, rtol=1e-6)
    assert found.step == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("budget", range(2, 12))
def test_the_bounds_are_steps_that_were_tried(budget: int, start: float) -> None:
    g = H @ POINT["w"]
    critical = 2 / rayleigh(H, g)
    found = hf.critical_sharpness(
        quadratic, POINT, H, {"w": g}, start=start, rtol=1e-9, max_evaluations=budget
    )
    assert found.bounds[0] <= critical <= found.bounds[1]
    assert found.evaluations <= budget
    assert not found.converged
    if found.bounds[0] == 0:
        # No step has lowered the loss yet: the value is a bound from below.
        assert found.value == 2 / found.bounds[1]


def test_a_point_where_the_loss_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="the loss is inf at params"):
        hf.critical_sharpness(lambda p, _: p["w"].sum() * math.inf, POINT, None, POINT)


def test_a_zero_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="the direction is zero"):
        hf.critical_sharpness(quadratic, POINT, H, {"w": torch.zeros(3).double()})


def test_dropout_is_drawn_the_same_for_every_step() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    batch = torch.randn(4, 3), torch.randn(4, 2)
    state = torch.get_rng_state()
    direction = hf.random_like(params, 1, seed=0)
    along = {name: leaf[0] for name, leaf in direction.items()}
    first, second = (hf.critical_sharpness(loss, params, batch, along) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"start": 0.0}, {"rtol": 0.0}, {"max_evaluations": 1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        hf.critical_sharpness(quadratic, POINT, H, POINT, **options)
