from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc import plot
from hessfunc.app.problems.nets import mlp
from hessfunc.tracking import Point, functional_tracker, read, stability, tracked
from hessfunc.tracking.stability import adam_stability, edges
from hessfunc.tracking.writers import json_lines, summary_writer
from tests.reference import hessian

Batch = tuple[Tensor, Tensor]


def batches(count: int = 3, size: int = 8) -> list[Batch]:
    return [(torch.randn(size + i, 4), torch.randint(3, (size + i,))) for i in range(count)]


def problem() -> tuple[Any, dict[str, Tensor], nn.Module]:
    model = mlp([4, 5, 3], nn.Tanh).double()
    model_fn, params = hf.functional(model)
    return hf.supervised(model_fn, F.cross_entropy), params, model


def wide(data: list[Batch]) -> list[Batch]:
    return [(inputs.double(), targets) for inputs, targets in data]


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
    found = method.measure(method.init(params), params, [batch], diagonal)[1]
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
    preconditioner = diagonal if end == "preconditioned" else None
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
    state, _ = method.measure(method.init(params), params, data, diagonal)
    state, none = method.measure(state, params, data)
    assert none.preconditioned is None
    assert method.measure(state, params, data, diagonal)[1].matvecs == 3


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
    # The pairs and their products are at hand, so that the trace costs its probes.
    assert found.matvecs == of_pairs + 10
    plain = hf.hutchinson(matvec, params, max_matvecs=10, seed=0)
    deflated = hf.hutchinson(matvec, params, deflate=state.top, max_matvecs=10, seed=0)
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


class Noisy(nn.Module):
    """Everything that a measurement could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.4)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.drop(torch.tanh(self.norm(self.inner(x)))))


def disturbing(outputs: Any, targets: Tensor) -> Tensor:
    random.random()
    np.random.rand()
    torch.rand(())
    return F.cross_entropy(outputs, targets)


@pytest.fixture
def other_streams() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    random.seed(3)
    np.random.seed(3)
    yield
    random.setstate(of_python)
    np.random.set_state(of_numpy)


def trained(
    data: Any, to_measure: Any, *, track: bool, eval_mode: bool
) -> tuple[list[Any], list[Point]]:
    """Everything that a training leaves, and the points."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = Noisy()
    model.inner.bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with tracked(
        model,
        disturbing,
        to_measure,
        every=2,
        optimizer=optimizer,
        preconditioned=True,
        eval_mode=eval_mode,
        top=2,
        bottom=1,
        trace_probes=3,
        critical=True,
    ) as tracker:
        if track:
            tracker.measure()
        for _ in range(2):
            for inputs, targets in data:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs + 0.1 * torch.randn_like(inputs)), targets).backward()
                optimizer.step()
                if track:
                    tracker.step()
    left = [
        *model.state_dict().values(),
        *(p.grad for p in model.parameters()),
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
    ]
    return left, tracker.points


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    return bool(left == right)


@pytest.mark.usefixtures("other_streams")
@pytest.mark.parametrize("eval_mode", [True, False])
def test_the_training_is_the_same_bit_for_bit(eval_mode: bool) -> None:
    data = batches(4)
    held = [data[0]]
    plain, none = trained(data, held, track=False, eval_mode=eval_mode)
    watched, points = trained(data, held, track=True, eval_mode=eval_mode)
    assert all(same(a, b) for a, b in zip(plain, watched, strict=True))
    assert not none
    assert [point.step for point in points] == [0, 2, 4, 6, 8]
    assert points[0].preconditioned is None
    assert all(point.preconditioned > 0 and point.lr == 0.01 for point in points[1:])


@pytest.mark.usefixtures("other_streams")
@pytest.mark.parametrize("own_generator", [True, False])
def test_the_training_may_share_its_loader(own_generator: bool) -> None:
    inputs, targets = torch.randn(20, 4), torch.randint(3, (20,))

    def loader() -> DataLoader[Any]:
        # Without one, each pass draws from torch's own stream.
        generator = torch.Generator().manual_seed(5) if own_generator else None
        data = TensorDataset(inputs, targets)
        return DataLoader(data, batch_size=5, shuffle=True, generator=generator)

    found = []
    for track in (False, True):
        shared = loader()
        found.append(trained(shared, shared, track=track, eval_mode=True)[0])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_a_loader_that_keeps_its_workers_is_refused() -> None:
    data = TensorDataset(torch.randn(4, 4), torch.zeros(4).long())
    loader = DataLoader(data, num_workers=1, persistent_workers=True)
    with (
        pytest.raises(ValueError, match="pass another loader"),
        tracked(Noisy(), F.cross_entropy, loader),
    ):
        pass


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
    ) as tracker:
        assert tracker.step() is None
        assert tracker.step(epoch=0.5) is seen[0]
        assert tracker.step(9, lr=0.1) is seen[1]
        tracker.measure(epoch=1)
    assert [(p.step, p.epoch, p.lr) for p in seen] == [(6, 0.5, 0.5), (9, None, 0.1), (9, 1, 0.5)]
    assert tracker.points == seen


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


def point(step: int, **fields: Any) -> Point:
    return Point(step=step, loss=0.5, **fields)


def test_points_are_read_as_they_were_written(tmp_path: Path) -> None:
    append = json_lines(tmp_path / "folder" / "points.jsonl")
    points = [point(0, top=(2.0, 1.0), top_residuals=(0.1, 0.2), lr=0.3), point(5, trace=4.0)]
    for one in points:
        append(one)
    assert read(tmp_path / "folder" / "points.jsonl") == points


def test_a_line_that_was_cut_short_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    json_lines(path)(point(0))
    with path.open("a") as file:
        file.write('{"step": 1, "lo')
    assert [one.step for one in read(path)] == [0]
    json_lines(path)(point(1))
    assert [one.step for one in read(path)] == [0, 1]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": 1}\n', "step,loss\n1,2.0\n", "a,b", "[1"])
def test_a_file_of_something_else_stays(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(text)
    with pytest.raises(ValueError, match="is not a point"):
        json_lines(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == text


def test_points_of_steps_that_were_made_again_are_left_out(tmp_path: Path) -> None:
    append = json_lines(tmp_path / "points.jsonl")
    for step in (0, 10, 20, 30, 20, 30, 40):
        append(point(step, epoch=step))
    assert [one.step for one in read(tmp_path / "points.jsonl")] == [0, 10, 20, 30, 40]


def test_a_line_that_is_no_point_is_named(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    json_lines(path)(point(0))
    with path.open("a") as file:
        file.write('{"steps": 1}\n')
    with pytest.raises(ValueError, match="line 2 of"):
        read(path)


WRITER = """
import sys
from hessfunc.tracking.writers import json_lines
from hessfunc.tracking.measure import Point
append = json_lines(sys.argv[1])
for step in range(10**6):
    append(Point(step=step, loss=1.0, top=(1.0,) * 300, top_residuals=(0.0,) * 300))
"""


@pytest.mark.slow
def test_lines_are_whole_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=Path.cwd())
    while not path.exists() or path.stat().st_size < 50_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [one.step for one in read(path)]
    assert steps == list(range(len(steps)))
    json_lines(path)(point(len(steps)))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        *steps,
        len(steps),
    ]


class Scalars:
    def __init__(self) -> None:
        self.found: list[tuple[str, float, int]] = []
        self.flushed = 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.found.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        self.flushed += 1


def test_tensorboard_gets_the_numbers_that_were_measured(tmp_path: Path) -> None:
    _, _, model = problem()
    writer = Scalars()
    out = tmp_path / "points.jsonl"
    with tracked(
        model, F.cross_entropy, wide(batches(1)), tensorboard=writer, out=out, top=2
    ) as tracker:
        first = tracker.measure(lr=0.5)
    found = {tag: value for tag, value, step in writer.found if step == 0}
    assert found == {
        "curvature/top 1": first.top[0],
        "curvature/top 2": first.top[1],
        "curvature/loss": first.loss,
        "curvature/matvecs": first.matvecs,
        "curvature/2 over lr": 4.0,
    }
    assert writer.flushed == 1
    assert read(out) == [first]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    _, _, model = problem()
    with tracked(model, F.cross_entropy, wide(batches(1)), tensorboard=tmp_path) as tracker:
        for step in (0, 5):
            tracker.step(step)
            tracker.measure(lr=0.5)
    found = events.EventAccumulator(os.fspath(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == {
        "curvature/top 1",
        "curvature/loss",
        "curvature/matvecs",
        "curvature/2 over lr",
    }
    top = [(event.step, event.value) for event in found.Scalars("curvature/top 1")]
    assert top == [(p.step, pytest.approx(p.top[0])) for p in tracker.points]
    assert [step for step, _ in top] == [0, 5]


def test_without_tensorboard_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        summary_writer(os.fspath(tmp_path))


def test_a_curve_has_a_line_for_each_value_and_that_of_stability() -> None:
    points = [point(s, top=(s + 1.0, 1.0), top_residuals=(0.1, 0.1), lr=0.5) for s in (0, 10)]
    ax = plot.tracked([*points, point(20, top=(5.0, 2.0), top_residuals=(0.1, 0.1), lr=0.25)])
    lines = {line.get_label(): line for line in ax.get_lines()}
    edge = "2 / lr (gradient descent)"
    assert list(lines) == ["largest eigenvalue, 1", "largest eigenvalue, 2", edge]
    assert list(lines["largest eigenvalue, 1"].get_ydata()) == [1, 11, 5]
    assert list(lines[edge].get_ydata()) == [4, 4, 8]
    assert list(lines[edge].get_xdata()) == [0, 10, 20]
    assert plot.tracked(points, ax=ax) is ax


@pytest.mark.parametrize(
    ("quantity", "fields"),
    [
        ("bottom", {"bottom": (-1.0,), "bottom_residuals": (0.1,)}),
        ("trace", {"trace": 3.0, "trace_stderr": 0.5}),
        ("preconditioned", {"preconditioned": 3.0, "preconditioned_residual": 0.5}),
        ("critical", {"critical": 3.0}),
    ],
)
def test_other_quantities_are_drawn(quantity: Any, fields: dict[str, Any]) -> None:
    points = [point(0), point(10, **fields, lr=0.1), point(20, **fields, lr=0.1)]
    ax = plot.tracked(points, quantity=quantity, threshold=lambda lr: 38 / lr)
    assert list(ax.get_lines()[0].get_xdata()) == [10, 20]
    assert list(ax.get_lines()[1].get_ydata()) == pytest.approx([380, 380])
    assert len(plot.tracked(points, quantity=quantity, threshold=None).get_lines()) == 1
    with pytest.raises(ValueError, match="no point has a"):
        plot.tracked([point(0)], quantity=quantity)


def test_momentum_raises_the_line() -> None:
    assert stability(0.1) == pytest.approx(20)
    assert stability(0.1, momentum=0.9) == pytest.approx(38)
    assert adam_stability(1e-3) == pytest.approx(38e3)


def grows(curvature: float, make: Callable[..., torch.optim.Optimizer]) -> bool:
    """Whether steps on ``curvature x^2 / 2`` grow, in the long run."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([x])
    for _ in range(600):
        x.grad = curvature * x.detach()
        optimizer.step()
    return float(x.detach().abs()) > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3},
        {"momentum": 0.9, "weight_decay": 3.0},
        {"dampening": 0.3},
    ],
    ids=str,
)
def test_the_edge_of_sgd_is_where_its_steps_begin_to_grow(options: dict[str, Any]) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, **options)

    edge, of_adam = edges(make([torch.nn.Parameter(torch.ones(1))]))
    assert edge is not None
    assert of_adam is None
    assert grows(1.02 * edge, make)
    assert not grows(0.98 * edge, make)


def test_the_edge_is_not_known_of_other_optimisers_and_of_groups_that_differ() -> None:
    x, y = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    assert edges(None) == (None, None)
    assert edges(torch.optim.RMSprop([x], lr=0.1)) == (None, None)
    groups = [{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.2}]
    assert edges(torch.optim.SGD(groups)) == (None, None)
    assert edges(torch.optim.SGD([x], lr=0.1), lr=0.0) == (None, None)
    assert edges(torch.optim.SGD([x], lr=0.1), lr=0.5) == (pytest.approx(4), None)
    assert edges(torch.optim.AdamW([x], lr=1e-3)) == (None, pytest.approx(38e3))
    assert edges(torch.optim.Adam([x], lr=1e-3, weight_decay=0.1)) == (None, None)
    assert edges(torch.optim.Adam([x], lr=0.1, betas=(0.0, 0.9))) == (None, pytest.approx(20))


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"top": 38.0}),
        (partial(torch.optim.SGD, lr=0.1), {"top": 20.0, "critical": 20.0}),
        (partial(torch.optim.AdamW, lr=0.1), {"preconditioned": 380.0}),
    ],
    ids=["momentum", "plain", "Adam"],
)
def test_an_edge_is_drawn_beside_the_quantity_that_it_bounds(
    make: Callable[..., torch.optim.Optimizer], known: dict[str, float]
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = make(model.parameters())
    batch = torch.randn(10, 4), torch.randint(2, (10,))
    is_adam = isinstance(optimizer, torch.optim.Adam)
    options = {"preconditioned": is_adam, "bottom": 1, "trace_probes": 2, "critical": True}
    with tracked(
        model, F.cross_entropy, [batch], every=1, optimizer=optimizer, **options
    ) as tracker:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            tracker.step()
    for quantity in ("top", "bottom", "trace", "critical", *(["preconditioned"] * is_adam)):
        ax = Figure().add_subplot()
        _, *line = plot.tracked(tracker.points, ax=ax, quantity=quantity).get_lines()  # type: ignore[arg-type]
        assert [float(one.get_ydata()[0]) for one in line] == pytest.approx(
            [known[quantity]] if quantity in known else []
        )


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
    "make", [lambda model: None, lambda model: torch.optim.SGD(model.parameters(), 0.1)]
)
def test_only_an_adam_preconditions(make: Callable[[nn.Module], Any]) -> None:
    model = Noisy()
    with (
        pytest.raises(TypeError, match="needs an Adam or AdamW optimiser"),
        tracked(model, F.cross_entropy, [], optimizer=make(model), preconditioned=True),
    ):
        pass


def test_a_loss_that_is_not_finite_is_a_point_without_values(tmp_path: Path) -> None:
    _, _, model = problem()
    inputs = torch.full((2, 4), float("nan")).double()
    data = [(inputs, torch.tensor([0, 1]))]
    with tracked(model, F.cross_entropy, data, out=tmp_path / "points") as tracker:
        assert tracker.measure().loss is None
    assert read(tmp_path / "points") == tracker.points
    assert tracker.points[0].top == ()


def test_autocast_is_off_in_a_measurement() -> None:
    model = mlp([4, 5, 3], nn.Tanh)
    with tracked(model, F.cross_entropy, batches(1)) as tracker:
        plain = tracker.measure()
        with torch.autocast("cpu"):
            found = tracker.measure()
    assert found.loss == plain.loss
    assert found.top == pytest.approx(plain.top, rel=1e-3)


def test_steps_that_are_told_in_jumps_or_twice() -> None:
    _, _, model = problem()
    with tracked(model, F.cross_entropy, wide(batches(1)), every=10) as tracker:
        for step in (3, 10, 10, 17, 24, 31, 38, 38, 45):
            tracker.step(step)
    assert [point.step for point in tracker.points] == [10, 24, 31, 45]
