"""Curvature at one point of a training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.optim import Stability
from hessfunc.tracking import functional_tracker, read, tracked
from tests.reference import hessian
from tests.tracking.problem import Batch, batches, problem, wide


def whole(data: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def test_a_measurement_is_of_the_mean_over_examples() -> None:
    loss, params, _ = problem()
    data = wide(batches())
    H = hessian(loss, params, whole(data))
    values = torch.linalg.eigvalsh(H)
    method = functional_tracker(loss, top=2, bottom=2, trace_probes=50, critical=True, rtol=1e-8)
    state, found = method.measure(method.init(params), params, data)
    assert found.top == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-8)
    assert found.bottom == pytest.approx(values[:2].tolist(), rel=1e-8)
    assert max(found.top_residuals) < 1e-7
    assert found.loss == pytest.approx(float(loss(params, whole(data))))
    assert abs(found.trace - float(H.trace())) < 4 * found.trace_stderr
    gradient = torch.func.grad(loss)(params, whole(data))
    expected = hf.critical_sharpness(loss, params, whole(data), gradient)
    assert found.critical == pytest.approx(expected.value, rel=0.02)
    assert found.evaluations > 0
    assert found.preconditioned is None
    again = method.measure(state, params, data)[1]
    assert again.top == pytest.approx(found.top)
    assert again.matvecs < found.matvecs - 10
    assert again.evaluations <= found.evaluations


def test_the_preconditioned_matrix_is_measured_where_there_is_a_diagonal() -> None:
    loss, params, _ = problem()
    (batch,) = wide(batches(1))
    diagonal = {name: torch.rand_like(p) + 0.1 for name, p in params.items()}
    root = hf.ravel(diagonal).rsqrt()
    expected = torch.linalg.eigvalsh(root[:, None] * hessian(loss, params, batch) * root)[-1]
    method = functional_tracker(loss, top=0, rtol=1e-8)
    limit = Stability(threshold=7.0, preconditioner=diagonal)
    found = method.measure(method.init(params), params, [batch], limit)[1]
    assert found.preconditioned_edge == 7.0
    assert found.top == ()
    assert found.preconditioned == pytest.approx(float(expected), rel=1e-8)


def nudged(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where a small step of a training leads."""
    return {name: p + 1e-3 * torch.randn_like(p) for name, p in params.items()}


@pytest.mark.parametrize("end", ["top", "bottom", "preconditioned"])
def test_each_eigenpair_is_followed_for_a_product_a_vector(end: str) -> None:
    loss, params, _ = problem()
    data = wide(batches(1))
    diagonal = {name: torch.rand_like(p) + 0.1 for name, p in params.items()}
    wanted = {"top": 0, **({} if end == "preconditioned" else {end: 1})}
    method = functional_tracker(loss, **wanted, rtol=0.02)
    limit = Stability(threshold=1.0, preconditioner=diagonal)
    preconditioner = limit if end == "preconditioned" else None
    state, cold = method.measure(method.init(params), params, data, preconditioner)
    later = nudged(params)
    found = method.measure(state, later, data, preconditioner)[1]
    # The pair, its guard and the scout.
    assert found.matvecs == 3
    assert cold.matvecs > 6
    matrix = hessian(loss, later, data[0])
    if end == "preconditioned":
        root = hf.ravel(diagonal).rsqrt()
        matrix = root[:, None] * matrix * root
    values = torch.linalg.eigvalsh(matrix)
    expected = float(values[0] if end == "bottom" else values[-1])
    (value,) = {
        "top": found.top,
        "bottom": found.bottom,
        "preconditioned": (found.preconditioned,),
    }[end]
    assert value == pytest.approx(expected, rel=1e-3)


def test_a_point_without_a_preconditioner_does_not_lose_its_vectors() -> None:
    loss, params, _ = problem()
    data = wide(batches(1))
    diagonal = {name: torch.rand_like(p) + 0.1 for name, p in params.items()}
    method = functional_tracker(loss, top=0)
    limit = Stability(threshold=1.0, preconditioner=diagonal)
    state, _ = method.measure(method.init(params), params, data, limit)
    state, none = method.measure(state, params, data)
    assert none.preconditioned is None
    assert method.measure(state, params, data, limit)[1].matvecs == 3


def test_critical_sharpness_starts_at_the_last_critical_step() -> None:
    mean, params, _ = problem()
    data = wide(batches(1))

    # Steep, so that its critical step is far from 1, where the first search starts.
    def loss(params: dict[str, Tensor], batch: Batch) -> Tensor:
        return 1000 * mean(params, batch)

    method = functional_tracker(loss, top=0, critical=True)
    state, _ = method.measure(method.init(params), params, data)
    later = nudged(params)
    gradient = torch.func.grad(loss)(later, data[0])
    cold = hf.critical_sharpness(loss, later, data[0], gradient)
    warm = hf.critical_sharpness(loss, later, data[0], gradient, start=state.critical_step)
    found = method.measure(state, later, data)[1]
    assert found.evaluations == warm.evaluations < cold.evaluations
    assert found.critical == pytest.approx(warm.value)
    assert state.critical_step != 1


def test_the_trace_takes_the_followed_eigenpairs_out() -> None:
    loss, params, _ = problem()
    (batch,) = wide(batches(1))
    method = functional_tracker(loss, top=2, trace_probes=10, rtol=1e-8)
    state, found = method.measure(method.init(params), params, [batch])
    alone = functional_tracker(loss, top=2, rtol=1e-8)
    matvec = hf.hvp(loss)(params, batch)
    of_pairs = alone.measure(alone.init(params), params, [batch])[1].matvecs
    # The pairs and their products are at hand, so that the trace costs a check and its probes.
    assert found.matvecs == of_pairs + 1 + 10
    plain = hf.hutchinson(matvec, params, max_matvecs=10, seed=0)
    deflated = hf.hutchinson(matvec, params, deflate=state.top, max_matvecs=11, seed=0)
    assert found.trace == pytest.approx(deflated.value)
    assert found.trace_stderr == pytest.approx(deflated.stderr)
    assert deflated.stderr < 0.95 * plain.stderr


def test_measuring_is_pure() -> None:
    loss, params, _ = problem()
    data = wide(batches(1))
    method = functional_tracker(loss, critical=True)
    first = method.measure(method.init(params), params, data)
    kept = {name: p.clone() for name, p in params.items()}
    state = copy.deepcopy(first[0])
    results = [method.measure(first[0], params, data)[1] for _ in range(2)]
    assert results[0] == results[1]
    assert all(torch.equal(p, kept[name]) for name, p in params.items())
    for name, leaf in state.top.vectors.items():
        assert torch.equal(leaf, first[0].top.vectors[name])


def test_a_loss_that_is_not_finite_is_a_point_without_values(tmp_path: Path) -> None:
    _, _, model = problem()
    inputs = torch.full((2, 4), float("nan")).double()
    data = [(inputs, torch.tensor([0, 1]))]
    with tracked(model, F.cross_entropy, data, out=tmp_path / "points") as tracker:
        assert tracker.measure().loss is None
    assert read(tmp_path / "points") == tracker.points
    assert tracker.points[0].top == ()
