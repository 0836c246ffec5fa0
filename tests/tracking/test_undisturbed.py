"""A training is the same with and without measurements."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.app.problems.nets import mlp
from hessfunc.tracking import Point, tracked
from tests.tracking.problem import Noisy, batches


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
        every=2 if track else None,
        optimizer=optimizer,
        preconditioned=True,
        eval_mode=eval_mode,
        top=2,
        bottom=1,
        trace_probes=3,
        critical=True,
    ) as tracker:
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
    inputs, targets = torch.randn(10, 4), torch.randint(3, (10,))

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


def test_autocast_is_off_in_a_measurement() -> None:
    model = mlp([4, 5, 3], nn.Tanh)
    with tracked(model, F.cross_entropy, batches(1)) as tracker:
        plain = tracker.measure()
        with torch.autocast("cpu"):
            found = tracker.measure()
    assert found.loss == plain.loss
    assert found.top == pytest.approx(plain.top, rel=1e-3)
