import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import Case, case
from tests.reference import gradient, hessian, matrix, relative_error

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


def test_a_point_where_the_loss_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="the loss is inf at params"):
        hf.critical_sharpness(lambda p, _: p["w"].sum() * math.inf, POINT, None, POINT)


def test_a_zero_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="the direction is zero"):
        hf.critical_sharpness(quadratic, POINT, H, {"w": torch.zeros(3).double()})


# Adam


def trained(steps: int, optimizer: Any, **options: Any) -> tuple[Case, torch.optim.Optimizer]:
    """A net after some steps."""
    found = case("mlp")
    parameters = found.model.parameters()
    made = optimizer(parameters, lr=0.01, **options)
    for _ in range(steps):
        made.zero_grad()
        found.loss(dict(found.model.named_parameters()), found.batch).backward()
        made.step()
    return found, made


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8), (0.0, 0.9)])
def test_the_diagonal_is_that_of_a_state_by_hand(steps: int, betas: tuple[float, float]) -> None:
    found = case("mlp")
    made = torch.optim.Adam(found.model.parameters(), lr=0.01, betas=betas, eps=1e-3)
    second = {name: torch.zeros_like(p) for name, p in found.model.named_parameters()}
    for _ in range(steps):
        made.zero_grad()
        found.loss(dict(found.model.named_parameters()), found.batch).backward()
        for name, p in found.model.named_parameters():
            second[name] = betas[1] * second[name] + (1 - betas[1]) * p.grad.square()  # type: ignore[union-attr]
        made.step()
    diagonal = hf.tracking.adam_diagonal(made, found.model)
    assert list(diagonal) == list(found.params)
    for name, v in second.items():
        root = (v / (1 - betas[1] ** steps)).sqrt() + 1e-3
        torch.testing.assert_close(diagonal[name], (1 - betas[0] ** steps) * root)
        assert not diagonal[name].requires_grad


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.5)}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-2}),
    ],
    ids=["Adam", "amsgrad", "AdamW"],
)
def test_a_step_is_the_first_moment_over_the_diagonal(optimizer: Any, options: Any) -> None:
    found, made = trained(5, optimizer, **options)
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    made.zero_grad()
    # Another batch: with the gradients falling, the maximum of amsgrad is no longer the average.
    loss = 0.1 * found.loss(dict(found.model.named_parameters()), found.batch)
    loss.backward()
    made.step()
    diagonal = hf.tracking.adam_diagonal(made, found.model)
    for name, p in found.model.named_parameters():
        step = 0.01 * made.state[p]["exp_avg"] / diagonal[name]
        torch.testing.assert_close(before[name] - p.detach(), step, rtol=1e-9, atol=1e-14)


def test_each_group_has_its_own_options() -> None:
    found = case("mlp")
    first, last = found.model[0], found.model[2]  # type: ignore[index]
    made = torch.optim.Adam(
        [{"params": last.parameters(), "eps": 10.0}, {"params": first.parameters(), "eps": 1.0}]
    )
    found.loss(dict(found.model.named_parameters()), found.batch).backward()
    made.step()
    diagonal = hf.tracking.adam_diagonal(made, found.model)
    for name, eps in (("0.weight", 1.0), ("2.weight", 10.0)):
        g = found.model.get_parameter(name).grad
        assert g is not None
        torch.testing.assert_close(diagonal[name], 0.1 * (g.abs() + eps))


def test_frozen_parameters_need_no_state() -> None:
    found = case("frozen")
    made = torch.optim.Adam(p for p in found.model.parameters() if p.requires_grad)
    found.loss(dict(found.model.named_parameters()), found.batch).backward()
    made.step()
    assert list(hf.tracking.adam_diagonal(made, found.model)) == list(found.params)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam]
)
def test_another_optimiser_is_refused(optimizer: Any) -> None:
    found, made = trained(2, optimizer)
    with pytest.raises(TypeError, match="pass an Adam or AdamW"):
        hf.tracking.adam_diagonal(made, found.model)


def test_an_optimiser_without_a_step_is_refused() -> None:
    found, made = trained(0, torch.optim.Adam)
    with pytest.raises(ValueError, match="has no second moment of '0.weight': pass an Adam"):
        hf.tracking.adam_diagonal(made, found.model)


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


def test_an_optimiser_of_another_model_is_refused() -> None:
    _, made = trained(1, torch.optim.Adam)
    with pytest.raises(ValueError, match="no second moment"):
        hf.tracking.adam_diagonal(made, nn.Linear(3, 2))


def test_preconditioned_eigenvalues_are_those_of_the_curvature_over_the_diagonal() -> None:
    found, made = trained(3, torch.optim.Adam)
    diagonal = hf.tracking.adam_diagonal(made, found.model)
    matvec = hf.matvecs.precondition(hf.hvp(found.loss)(found.params, found.batch), diagonal)
    P = hf.ravel(diagonal)
    A = hessian(found.loss, found.params, found.batch)
    dense = matrix(matvec, found.params)
    assert relative_error(dense, A / P.sqrt().outer(P.sqrt())) < 1e-10
    expected = torch.linalg.eigvals(A / P[:, None]).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh((dense + dense.mT) / 2), expected)
    top = hf.lanczos(matvec, found.params, k=1, which="LA", seed=0)
    assert float(top.values[0]) == pytest.approx(float(expected[-1]), rel=1e-3)
