"""Products from the rows and shards of each rank are those of the whole batch and model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.own_rows import part_of
from hessfunc.trees import whole
from tests.distributed import modules, problems
from tests.distributed.ranks import Ranks

INPUTS, LABELS = (x[:5] for x in modules.batch("mlp"))
mlp = partial(modules.model, "mlp")


Losses = Callable[[Any], Any]


def frozen() -> nn.Module:
    model = mlp()
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    model[2].weight.requires_grad_(False)  # type: ignore[union-attr]
    return model


def regularised(model_fn: Any) -> Any:
    def loss(params: Any, pair: Any) -> Tensor:
        squares = [leaf.square().sum() for leaf in params.values()]
        return F.cross_entropy(model_fn(params, pair[0]), pair[1]) + whole(sum(squares))

    return loss


def log_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """Neither a mean nor a sum over rows."""
    return (outputs.exp().sum() + targets.sum()).log()


def supervised(criterion: Any) -> Losses:
    return lambda model_fn: hf.supervised(model_fn, criterion)


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
IGNORED = torch.tensor([0, -100, 1, 2, -100])
ON_RANK_1 = torch.tensor([-100, -100, 0, -100, 1])
KINDS: dict[str, tuple[Losses, Any, Callable[[], nn.Module]]] = {
    "sum": (supervised(partial(F.cross_entropy, reduction="sum")), (INPUTS, LABELS), mlp),
    "mse": (supervised(F.mse_loss), (INPUTS, INPUTS[:, :3]), mlp),
    "class weights": (supervised(nn.CrossEntropyLoss(CLASS_WEIGHTS)), (INPUTS, LABELS), mlp),
    "ignored": (supervised(F.cross_entropy), (INPUTS, IGNORED), mlp),
    "a rank without targets": (supervised(F.cross_entropy), (INPUTS, ON_RANK_1), mlp),
    "one example": (supervised(F.cross_entropy), (INPUTS[:1], LABELS[:1]), mlp),
    "not a mean": (supervised(log_sum), (INPUTS, LABELS), mlp),
    "plain": (regularised, (INPUTS, LABELS), mlp),
    "frozen": (supervised(F.cross_entropy), (INPUTS, LABELS), frozen),
}


def kind_differs_by(kind: str) -> list[float]:
    loss_of_kind, batch, make = KINDS[kind]
    model_fn, params = hf.functional(make())
    plain = loss_of_kind(model_fn)
    sharded_fn, shards = hf.functional(make(), mesh=problems.mesh(2))
    sharded = loss_of_kind(sharded_fn)
    block, sharded_block = (modules.random_block(p, 4) for p in (params, shards))
    of: list[Any] = [hf.hvp]
    if kind not in ("plain", "not a mean"):
        of += [hf.ggnvp, hf.efvp]
    errors = [abs(float(sharded(shards, batch)) - float(plain(params, batch)))]
    for curvature in of:
        found = curvature(sharded)(shards, batch)(sharded_block)
        errors.append(modules.error(found, curvature(plain)(params, batch)(block)))
    return errors


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_other_kinds(kind: str, two: Ranks) -> None:
    for errors in two.run(kind_differs_by, kind):
        assert max(errors) < 1e-10


# Batches of several sizes, one of them smaller than the number of ranks.
BATCHES = [(INPUTS, LABELS), (INPUTS[:1], LABELS[:1]), (INPUTS[1:], IGNORED[1:])]


def over_batches_differs_by(keep: bool) -> float:
    model_fn, params = hf.functional(mlp())
    mean = hf.over_batches(hf.hvp(hf.supervised(model_fn, F.cross_entropy)))
    wanted = mean(params, BATCHES)(modules.random_block(params, 4))
    model_fn, params = hf.functional(mlp(), mesh=problems.mesh(2))
    mean = hf.over_batches(hf.hvp(hf.supervised(model_fn, F.cross_entropy)), keep=keep)
    return modules.error(mean(params, BATCHES)(modules.random_block(params, 4)), wanted)


@pytest.mark.parametrize("keep", [False, True])
def test_means_over_batches(keep: bool, two: Ranks) -> None:
    assert max(two.run(over_batches_differs_by, keep)) < 1e-10


def share_of(kind: str) -> float | None:
    """Return the share of this rank, or None if the rows are not divided."""
    loss_of_kind, batch, make = KINDS[kind]
    model_fn, params = hf.functional(make(), mesh=problems.mesh(2))
    part = part_of(loss_of_kind(model_fn), params, batch)
    return None if part.space.distributed else part.share


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("sum", [1, 1]),
        ("mse", [0.4, 0.6]),
        ("ignored", [1 / 3, 2 / 3]),
        ("a rank without targets", [None, None]),
        ("one example", [None, None]),
        ("not a mean", [None, None]),
        ("plain", [None, None]),
    ],
)
def test_rows_are_divided_where_the_loss_is_a_mean_over_them(
    kind: str, shares: list[float | None], two: Ranks
) -> None:
    assert two.run(share_of, kind) == pytest.approx(shares)


def tensor_parallel_is_not_divided() -> bool:
    module = modules.tensor_parallel("mlp", problems.mesh(2, names=("tensor",)))
    loss, params = modules.loss_of(module)
    part = part_of(loss, params, modules.batch("mlp"))
    return part.loss is loss and part.space.distributed


def test_other_models_of_dtensors_see_the_whole_batch(two: Ranks) -> None:
    assert all(two.run(tensor_parallel_is_not_divided))


def products(loss_of_model: Losses, *, x: Tensor = INPUTS) -> None:
    model_fn, params = hf.functional(mlp(), mesh=problems.mesh(2))
    matvec = hf.hvp(loss_of_model(model_fn))(params, (x, LABELS))
    matvec(modules.random_block(params, 1))


def infinite_on_rank_1() -> None:
    products(supervised(F.cross_entropy), x=INPUTS.index_fill(0, torch.tensor([4]), torch.inf))


def scaled_by_a_parameter(model_fn: Any) -> Any:
    return hf.composed(
        lambda params, pair: model_fn(params, pair[0]) * params["0.bias"].sum(),
        F.cross_entropy,
        targets=lambda pair: pair[1],
    )


def test_a_loss_that_is_infinite_on_one_rank_raises_on_both(two: Ranks) -> None:
    first, second = two.outcomes(infinite_on_rank_1)
    assert first.error is not None
    assert first.error.startswith("RuntimeError: failed on another rank")
    assert second.error is not None
    assert second.error.startswith("ValueError: the loss is nan")


def reads_a_parameter() -> None:
    products(scaled_by_a_parameter)


def test_outputs_that_read_shards_are_refused(two: Ranks) -> None:
    two.refuse("RuntimeError: the outputs of the loss read parameters", reads_a_parameter)
