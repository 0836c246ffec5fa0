from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.randomness import seeded
from tests.cases import case
from tests.reference import hessian

Problem: TypeAlias = tuple[hf.Loss, dict[str, Tensor], list[tuple[Tensor, Tensor]]]

SIZES = [8, 5]


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A net that has begun to fit its data: there the functional Hessian is small."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        x = torch.randn(sum(SIZES), 4).double()
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=15)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    return loss, params, list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def dense(problem: Problem) -> Tensor:
    loss, params, batches = problem
    each = torch.stack([hessian(loss, params, batch) for batch in batches])
    return torch.einsum("b,bij->ij", torch.tensor(SIZES).double() / sum(SIZES), each)


def test_intervals_cover_and_samples_vary_less_than_those_of_the_whole(problem: Problem) -> None:
    loss, params, batches = problem
    trace = float(dense(problem).trace())
    runs = [
        hf.hessian_trace(loss, params, batches, max_matvecs=20, block_size=20, keep=True, seed=s)
        for s in range(60)
    ]
    covered = sum(low <= trace <= high for low, high in (r.interval() for r in runs))
    assert covered / len(runs) >= 0.88
    whole = hf.hutchinson(
        hf.over_batches(hf.hvp(loss), keep=True)(params, batches),
        params,
        kind="signs",
        max_matvecs=400,
        seed=0,
    )
    spread = torch.cat([run.samples for run in runs]).std()
    assert spread < 0.7 * whole.samples.std()
    errors = torch.tensor([run.value - trace for run in runs])
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / len(runs) ** 0.5


def test_a_tolerance_is_met_and_leaves_sum_to_the_value(problem: Problem) -> None:
    loss, params, batches = problem
    found = hf.hessian_trace(loss, params, batches, rtol=0.02, max_matvecs=4000, seed=0)
    assert "converged" in found.reason
    low, high = found.interval()
    assert (high - low) / 2 <= 0.02 * found.value
    parts = dense(problem).diagonal().split([leaf.numel() for leaf in params.values()])
    assert sum(found.by_leaf.values()) == pytest.approx(found.value, rel=1e-10)
    for name, part in zip(params, parts, strict=True):
        assert found.by_leaf[name] == pytest.approx(float(part.sum()), abs=0.1 * found.value)


def test_a_run_goes_on_from_its_checkpoint(problem: Problem, tmp_path: Path) -> None:
    loss, params, batches = problem
    options: dict[str, Any] = {"max_matvecs": 40, "seed": 3}
    whole = hf.hessian_trace(loss, params, batches, **options)
    stopped = hf.hessian_trace(
        loss, params, batches, checkpoint=tmp_path, callback=lambda e: e.matvecs >= 20, **options
    )
    assert stopped.matvecs == 20
    resumed = hf.hessian_trace(loss, params, batches, checkpoint=tmp_path, **options)
    assert torch.equal(resumed.samples, whole.samples)


class Augmented:
    """Other examples in each pass."""

    def __init__(self, loader: list[tuple[Tensor, Tensor]]) -> None:
        self.loader = loader
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for x, y in self.loader:
            yield x * self.passes, y


@pytest.mark.parametrize("options", [{"keep": True}, {"max_matvecs": 10}])
def test_both_parts_are_of_the_same_examples(problem: Problem, options: dict[str, Any]) -> None:
    loss, params, batches = problem
    with pytest.raises(ValueError, match="saw different examples"):
        hf.hessian_trace(loss, params, Augmented(batches), seed=0, **options)


def test_a_model_that_does_not_go_through_vmap() -> None:
    found = case("lstm")
    trace = float(hessian(found.loss, found.params, found.batch).trace())
    options: dict[str, Any] = {"examples_per_chunk": 1, "max_matvecs": 400, "seed": 0}
    estimate = hf.hessian_trace(found.loss, found.params, [found.batch], **options)
    low, high = estimate.interval(0.999)
    assert low <= trace <= high
