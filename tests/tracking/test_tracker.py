from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.nets import mlp
from hessfunc.display import Progress
from hessfunc.optim import Stability
from hessfunc.tracking import Point, frozen, tracked
from tests.reference import hessian
from tests.tracking.problem import Noisy, batches, problem, wide


def test_curvature_is_that_of_eval_mode_by_default() -> None:
    model = Noisy().double()
    data = wide(batches(1))
    model(data[0][0])
    with tracked(model, F.cross_entropy, data, rtol=1e-8) as tracker:
        found = tracker.measure()
    model.eval()
    model_fn, params = hf.functional(model)
    H = hessian(hf.supervised(model_fn, F.cross_entropy), params, data[0])
    assert found.top[0] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-8)


def test_steps_are_counted_or_told() -> None:
    _, _, model = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    seen: list[Point] = []
    with tracked(
        model,
        F.cross_entropy,
        wide(batches(1)),
        every=3,
        optimizer=optimizer,
        callback=seen.append,
        steps=4,
        epoch=0.25,
    ) as tracker:
        assert tracker.step() is None
        assert tracker.step(epoch=0.5) is seen[1]
        assert tracker.step(9, lr=0.1) is seen[2]
        tracker.measure(epoch=1)
    assert [(p.step, p.epoch, p.lr) for p in seen] == [
        (4, 0.25, 0.5),
        (6, 0.5, 0.5),
        (9, None, 0.1),
        (9, 1, 0.5),
    ]
    assert tracker.points == seen
    assert repr(tracker).startswith("Tracker(points=4, steps=9, last=Point(step=9, ")


def test_any_batch_by_a_composed_loss() -> None:
    _, _, model = problem()
    ((inputs, targets),) = wide(batches(1))
    with tracked(
        model,
        lambda outputs, batch: F.cross_entropy(outputs, targets),
        [(inputs,)],
        compose=lambda model_fn, criterion: hf.composed(
            lambda params, batch: model_fn(params, batch[0]), criterion
        ),
        curvature=hf.hvp,
    ) as tracker:
        assert len(tracker.measure().top) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"top": -1}, "top=-1"),
        ({"top": 10**6, "max_matvecs": 10**7}, "eigenvalues"),
        ({"trace_probes": 1}, "trace_probes=1"),
        ({"max_matvecs": 2}, "max_matvecs=2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(ValueError, match=message),
        tracked(Noisy(), F.cross_entropy, batches(1), **options),
    ):
        pass


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda model: None, {}, TypeError, "needs an optimiser: pass `optimizer=optimizer`"),
        (
            lambda model: torch.optim.ASGD(model.parameters(), 0.1),
            {},
            TypeError,
            "ASGD has no known stability limit",
        ),
        (lambda model: None, {"stability": 3.0}, TypeError, "must be a Stability or a function"),
        (
            lambda model: None,
            {"stability": Stability(threshold=1.0), "preconditioned": False},
            ValueError,
            "only with preconditioned=True",
        ),
    ],
)
def test_only_a_known_optimiser_preconditions(
    make: Callable[[nn.Module], Any], options: dict[str, Any], error: Any, message: str
) -> None:
    model = Noisy()
    options = {"preconditioned": True, "optimizer": make(model)} | options
    with pytest.raises(error, match=message), tracked(model, F.cross_entropy, [], **options):
        pass


def test_a_learning_rate_of_zero_and_groups_that_differ_have_no_edge_of_their_own() -> None:
    _, _, model = problem()
    data = wide(batches(1))
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.2}], lr=0.1)
    with tracked(model, F.cross_entropy, data, optimizer=optimizer, preconditioned=True) as tracker:
        found = tracker.measure()
        assert found.edge is None
        assert found.preconditioned_edge == pytest.approx(20)
        optimizer.param_groups[0]["lr"] = 0.0
        found = tracker.measure()
        assert found.edge is None
        assert found.preconditioned is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tracked(model, F.cross_entropy, data, optimizer=optimizer) as tracker:
        assert tracker.measure(lr=0.5).edge == pytest.approx(4)
        assert tracker.measure(lr=0.0).edge is None


def test_muon_beside_adam_is_measured_in_its_norm() -> None:
    loss, _, model = problem()
    data = wide(batches(1))
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.01)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], lr=0.01)
    with tracked(
        model, F.cross_entropy, data, every=1, optimizer=[muon, adam], preconditioned=True
    ) as tracker:
        assert tracker.measure().preconditioned is None
        for _ in range(2):
            F.cross_entropy(model(data[0][0]), data[0][1]).backward()
            muon.step()
            adam.step()
            # The measurement takes the gradient on its own batches.
            model.zero_grad()
            found = tracker.step()
    assert found is not None
    now = {name: p.detach() for name, p in model.named_parameters()}
    gradient = torch.func.grad(loss)(now, data[0])
    limit = hf.stability([muon, adam], model, gradient=gradient)
    assert found.preconditioned_edge == pytest.approx(limit.threshold)
    assert found.optimizer == "Muon + AdamW"
    H = hessian(loss, now, data[0])
    d = hf.ravel(tracker.state.direction)
    assert found.preconditioned == pytest.approx(float(d @ H @ d))
    expected = hf.generalized_sharpness(
        hf.dense((H + H.mT) / 2), now, limit.norm, restarts=10, seed=1, rtol=1e-6
    )
    assert found.preconditioned == pytest.approx(expected.value, rel=0.05)


def test_a_stability_of_ones_own_is_measured() -> None:
    loss, params, model = problem()
    data = wide(batches(1))
    twos = {name: 2 * torch.ones_like(p) for name, p in params.items()}
    seen: list[Any] = []

    def own(gradient: Any) -> Stability:
        seen.append(gradient)
        return Stability(threshold=5.0, preconditioner=twos)

    options: dict[str, Any] = {"preconditioned": True, "rtol": 1e-8}
    top = float(torch.linalg.eigvalsh(hessian(loss, params, data[0]))[-1])
    for stability in (own, Stability(threshold=5.0, preconditioner=twos)):
        with tracked(model, F.cross_entropy, data, stability=stability, **options) as tracker:
            found = tracker.measure()
        assert found.preconditioned == pytest.approx(top / 2)
        assert found.preconditioned_edge == 5.0
    (gradient,) = seen
    expected = torch.func.grad(loss)(params, data[0])
    torch.testing.assert_close(hf.ravel(gradient), hf.ravel(expected))


def test_steps_that_are_told_in_jumps_or_twice() -> None:
    _, _, model = problem()
    with tracked(model, F.cross_entropy, wide(batches(1)), every=10) as tracker:
        for step in (3, 10, 10, 17, 24, 31, 38, 38, 45):
            tracker.step(step)
    assert [point.step for point in tracker.points] == [0, 10, 24, 31, 45]


@pytest.mark.slow
def test_sharpness_rises_to_the_edge_of_stability_and_hovers_there() -> None:
    """Full-batch gradient descent of Cohen et al. 2021, arXiv 2103.00065."""
    lr, examples = 0.1, digits()[:1000]
    inputs = (examples.inputs - examples.inputs.mean()) / examples.inputs.std()
    targets = F.one_hot(examples.targets, 10).float()
    model = mlp([64, 64, 64, 10], nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr)

    def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).mean() / 2

    batches = [(inputs, targets)]
    with tracked(model, squared_error, batches, every=10, optimizer=optimizer) as tracker:
        for _ in range(1500):
            optimizer.zero_grad()
            squared_error(model(inputs), targets).backward()
            optimizer.step()
            tracker.step()
    points = tracker.points
    sharpness = [point.top[0] / (2 / lr) for point in points]
    assert sharpness[0] < 0.7
    reached = next((i for i, value in enumerate(sharpness) if value >= 0.9), None)
    assert reached is not None
    assert all(0.7 < value < 1.3 for value in sharpness[reached:])
    assert mean(sharpness[-50:]) == pytest.approx(1, abs=0.1)
    # Training goes on all the same.
    assert points[-1].loss < 0.6 * points[reached].loss
    # Cold starts take 11.
    assert mean(point.matvecs for point in points[1:]) < 5


def test_progress_follows_the_points() -> None:
    _, _, model = problem()
    seen: list[Progress] = []
    with tracked(
        model, F.cross_entropy, wide(batches(1)), every=2, progress=seen.append
    ) as tracker:
        for _ in range(4):
            tracker.step()
    assert [(record.done, record.unit) for record in seen] == [
        (0, "steps"),
        (2, "steps"),
        (4, "steps"),
    ]
    assert [record.value for record in seen] == [point.top[0] for point in tracker.points]


def test_the_first_point_is_made_at_once() -> None:
    _, _, model = problem()
    with tracked(model, F.cross_entropy, wide(batches(1)), every=100) as tracker:
        assert [point.step for point in tracker.points] == [0]
    with tracked(model, F.cross_entropy, wide(batches(1))) as tracker:
        assert not tracker.points


def test_hooks_may_run_in_inference_mode() -> None:
    _, _, model = problem()
    data = wide(batches(2))
    options: dict[str, Any] = {"top": 2, "bottom": 1, "trace_probes": 3, "critical": True}
    with tracked(model, F.cross_entropy, data, **options) as tracker:
        expected = tracker.measure()
    with torch.inference_mode():
        inside = [(inputs.clone(), targets.clone()) for inputs, targets in data]
        with tracked(model, F.cross_entropy, inside, **options) as tracker:
            found = [tracker.measure(), tracker.measure()]
    # The next point starts from the vectors of the last one, outside of inference mode too.
    found.append(tracker.measure())
    for point in found:
        assert point.top == pytest.approx(expected.top, rel=1e-3)
        assert point.bottom == pytest.approx(expected.bottom, rel=1e-3)
    # Later points start at the step of the last one.
    assert found[0].critical == pytest.approx(expected.critical, rel=1e-6)


def test_a_loader_with_random_augmentation_is_refused_at_once() -> None:
    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return torch.randn(4).double(), index % 3

    _, _, model = problem()
    loader = torch.utils.data.DataLoader(Augmented(), batch_size=4)
    with (
        pytest.raises(ValueError, match=r"hf.tracking.frozen\(loader, batches=4\)"),
        tracked(model, F.cross_entropy, loader, every=1),
    ):
        pass
    with tracked(model, F.cross_entropy, frozen(loader, batches=1), every=1) as tracker:
        tracker.step()
    first, second = tracker.points
    assert first.loss == second.loss


def test_a_wrapped_model_is_measured_by_each_rank_and_written_by_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        _, _, model = problem()
        wrapped, data = nn.parallel.DistributedDataParallel(model), wide(batches(1))
        for rank in (0, 1):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            out = tmp_path / f"{rank}.jsonl"
            with tracked(wrapped, F.cross_entropy, data, every=1, out=out) as tracker:
                assert len(tracker.points) == 1
            assert out.exists() == (rank == 0)
        with tracked(model, F.cross_entropy, data, every=1) as plain:
            pass
        assert plain.points[0].top == tracker.points[0].top
    finally:
        torch.distributed.destroy_process_group()


def test_a_loop_of_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    _, _, plain = problem()
    data = wide(batches(1))
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    model, prepared = accelerator.prepare(plain, optimizer)
    with tracked(
        model, F.cross_entropy, data, every=1, optimizer=prepared, preconditioned=True
    ) as tracker:
        for inputs, targets in data:
            prepared.zero_grad()
            accelerator.backward(F.cross_entropy(model(inputs), targets))
            prepared.step()
            tracker.step()
    assert [point.lr for point in tracker.points] == [0.01, 0.01]
    assert tracker.points[1].preconditioned is not None
    assert tracker.points[1].preconditioned_edge == pytest.approx(2 * 1.9 / 0.1 / 0.01)


def test_a_forgotten_with_is_named() -> None:
    model = nn.Linear(3, 2)
    tracker = tracked(model, F.mse_loss, [(torch.zeros(1, 3), torch.zeros(1, 2))])
    with pytest.raises(AttributeError, match=r"use `with tracked.*tracker\.step"):
        tracker.step()  # type: ignore[attr-defined]
    with tracker as inside:
        assert inside.points == []
