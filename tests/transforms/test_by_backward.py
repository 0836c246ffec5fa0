"""Products with a module of `fully_shard` are those of the module itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.distributed import modules, problems
from tests.distributed.ranks import Ranks


def loss_of(module: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.cross_entropy(module(batch[0]), batch[1])


def problem(name: str, ranks: int) -> tuple[nn.Module, dict[str, Tensor], Any]:
    module = modules.fully_sharded(name, problems.mesh(ranks))
    params = dict(module.named_parameters())
    return module, params, hf.hvp_by_backward(module, loss_of(module))


def differs_by(name: str, ranks: int) -> float:
    _, params, curvature = problem(name, ranks)
    found = curvature(params, modules.batch(name))(modules.random_block(params, 3))
    loss, like = modules.loss_of(modules.model(name))
    wanted = hf.hvp(loss)(like, modules.batch(name))(modules.random_block(like, 3))
    return modules.error(found, wanted)


@pytest.mark.parametrize("name", modules.MODELS)
def test_differences_of_gradients_are_as_accurate_as_they_say(
    name: str, two: Ranks, four: Ranks
) -> None:
    assert max(two.run(differs_by, name, 2)) < 1e-9
    assert max(four.run(differs_by, name, 4)) < 1e-9


def runs_differ_by(name: str) -> tuple[float, float]:
    _, params, curvature = problem(name, 2)
    return modules.runs_differ_by(curvature(params, modules.batch(name)), params, name)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_eigenvalues_and_traces_are_those_of_the_module_itself(name: str, two: Ranks) -> None:
    for eigenvalues, trace in two.run(runs_differ_by, name):
        assert eigenvalues < 1e-8
        assert trace < 1e-8


def with_batches_of_their_own() -> float:
    _, params, curvature = problem("mlp", 2)
    batches = [modules.batch("mlp", seed=seed) for seed in range(4)]
    found = hf.over_batches(curvature)(params, batches[dist.get_rank() :: 2])
    loss, like = modules.loss_of(modules.model("mlp"))
    wanted = hf.over_batches(hf.hvp(loss))(like, batches)
    return modules.error(
        found(modules.random_block(params, 2)), wanted(modules.random_block(like, 2))
    )


def test_ranks_that_each_have_batches_of_one_size(two: Ranks) -> None:
    assert max(two.run(with_batches_of_their_own)) < 1e-9


def of_a_part() -> float:
    _, params, curvature = problem("mlp", 2)
    part, _ = hf.split(params, "2.*")
    found = curvature(part, modules.batch("mlp"))(modules.random_block(part, 2))
    loss, like = modules.loss_of(modules.model("mlp"))
    head, rest = hf.split(like, "2.*")
    matvec = hf.hvp(hf.hold(loss, rest))(head, modules.batch("mlp"))
    return modules.error(found, matvec(modules.random_block(head, 2)))


def test_other_parameters_are_held(two: Ranks) -> None:
    assert max(two.run(of_a_part)) < 1e-9


def state(module: nn.Module) -> list[Tensor]:
    local = [p.to_local() for p in module.parameters()]
    gradients = [p.grad.to_local() for p in module.parameters()]
    return [x.clone() for x in (*local, *gradients, *module.buffers())]


def left_as_it_was(*, raises: bool) -> bool:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    module = modules.fully_shard(net.double(), mesh=problems.mesh(2))
    loss = loss_of(module)
    batch = modules.batch("mlp")
    loss(batch).backward()
    params = dict(module.named_parameters())
    calls = []

    def failing(batch: Any) -> Tensor:
        calls.append(batch)
        value = loss(batch)
        if raises and len(calls) == 3:
            raise KeyError("in the middle of a product")
        return value

    kept, versions = state(module), [p._version for p in params.values()]
    gradients = [p.grad for p in module.parameters()]
    drawn = torch.get_rng_state()
    matvec = hf.hvp_by_backward(module, failing)(params, batch)
    try:
        matvec(modules.random_block(params, 1))
    except KeyError:
        assert raises
    assert len(calls) == 3
    assert versions == [p._version for p in params.values()]
    assert all(p.grad is g for p, g in zip(module.parameters(), gradients, strict=True))
    assert torch.equal(drawn, torch.get_rng_state())
    same = zip(kept, state(module), strict=True)
    return all(torch.equal(a, b) for a, b in same)


def left_after_a_product() -> bool:
    return left_as_it_was(raises=False)


def left_after_a_failure() -> bool:
    return left_as_it_was(raises=True)


@pytest.mark.parametrize("run", [left_after_a_product, left_after_a_failure])
def test_the_module_is_left_as_it_was(run: Callable[[], bool], two: Ranks) -> None:
    assert all(two.run(run))


def between_forward_and_backward() -> float:
    module, params, curvature = problem("mlp", 2)
    batch = modules.batch("mlp")
    with torch.no_grad():
        module(batch[0])
    found = curvature(params, batch)(modules.random_block(params, 1))
    loss, like = modules.loss_of(modules.model("mlp"))
    return modules.error(found, hf.hvp(loss)(like, batch)(modules.random_block(like, 1)))


def test_parameters_that_are_gathered_are_sharded_again(two: Ranks) -> None:
    assert max(two.run(between_forward_and_backward)) < 1e-9


def changed_in_place() -> None:
    module, params, curvature = problem("mlp", 2)
    matvec = curvature(params, modules.batch("mlp"))
    matvec(modules.random_block(params, 1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    matvec(modules.random_block(params, 1))


def of_another_module() -> None:
    _, params, _ = problem("mlp", 2)
    _, _, curvature = problem("transformer", 2)
    curvature(params, modules.batch("mlp"))


def of_a_constant() -> None:
    module, params, _ = problem("mlp", 2)
    constant = torch.zeros((), dtype=torch.float64, requires_grad=True)
    hf.hvp_by_backward(module, lambda _: constant)(params, modules.batch("mlp"))


def infinite_on_one() -> None:
    _, params, curvature = problem("mlp", 2)
    inputs, targets = modules.batch("mlp")
    curvature(params, (inputs / (1 - dist.get_rank()), targets))


def test_a_loss_that_is_not_finite_on_one_rank_is_an_error_on_all(two: Ranks) -> None:
    first, second = two.outcomes(infinite_on_one)
    assert first.error is not None
    assert first.error.startswith("RuntimeError: failed on another rank")
    assert second.error is not None
    assert second.error.startswith("ValueError: the loss is nan: check the parameters")


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (changed_in_place, "RuntimeError: '0.weight' has changed in place"),
        (of_another_module, "ValueError: FSDPTransformer has no parameter named 0.weight, 0.bias"),
        (of_a_constant, "ValueError: the loss does not depend on params"),
    ],
)
def test_what_would_be_wrong_is_refused(refused: object, message: str, two: Ranks) -> None:
    two.refuse(message, refused)  # type: ignore[arg-type]


def with_a_twin(name: str) -> tuple[float, float]:
    mesh = problems.mesh(2)
    sharded = modules.fully_sharded(name, mesh)
    params, batches = hf.unsharded(sharded), [modules.batch(name, seed=s) for s in range(3)]
    model_fn, like = hf.functional(modules.model(name))
    assert list(params) == list(like)
    loss = hf.supervised(model_fn, F.cross_entropy)
    plain = hf.over_batches(hf.hvp(loss))(like, batches)
    matvec = hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches)
    block = modules.random_block(like, 2)
    space = hf.sharded(params, mesh)
    found = hf.lanczos(matvec, params, k=2, rtol=1e-6, seed=1, space=space).values
    wanted = hf.lanczos(plain, like, k=2, rtol=1e-6, seed=1).values
    return modules.error(matvec(block), plain(block)), float((found - wanted).abs().max())


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_a_twin_takes_the_parameters_whole(name: str, two: Ranks) -> None:
    for product, eigenvalues in two.run(with_a_twin, name):
        assert product < 1e-12
        assert eigenvalues < 1e-9


def gathered_in_the_graph(name: str) -> float:
    params = dict(modules.fully_sharded(name, problems.mesh(2)).named_parameters())
    loss, like = modules.loss_of(modules.model(name))

    def gathering(params: Any, batch: Any) -> Tensor:
        return loss({name: leaf.full_tensor() for name, leaf in params.items()}, batch)

    found = hf.hvp(gathering)(params, modules.batch(name))(modules.random_block(params, 2))
    wanted = hf.hvp(loss)(like, modules.batch(name))(modules.random_block(like, 2))
    return modules.error(found, wanted)


@pytest.mark.parametrize("name", modules.MODELS)
def test_a_loss_may_gather_the_parameters_itself(name: str, two: Ranks) -> None:
    assert max(two.run(gathered_in_the_graph, name)) < 1e-12


def copies() -> bool:
    module = modules.fully_sharded("mlp", problems.mesh(2))
    params = hf.unsharded(module)
    before = {name: leaf.clone() for name, leaf in params.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    return all(torch.equal(params[name], before[name]) for name in before)


def test_whole_parameters_are_copies(two: Ranks) -> None:
    assert all(two.run(copies))


def test_a_module_of_one_process() -> None:
    module = modules.model("mlp")
    params = dict(module.named_parameters())
    batch = modules.batch("mlp")
    block = modules.random_block(params, 2)
    loss, like = modules.loss_of(module)
    found = hf.hvp_by_backward(module, loss_of(module))(params, batch)(block)
    assert modules.error(found, hf.hvp(loss)(like, batch)(block)) < 1e-9
    assert all(p.grad is None for p in module.parameters())
    unsharded = hf.unsharded(module)
    assert all(torch.equal(unsharded[name], leaf) for name, leaf in like.items())
