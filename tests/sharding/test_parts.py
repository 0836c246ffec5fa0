"""Each rank holds a part of every parameter, and blocks gather their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import hessfunc as hf
from tests.distributed import modules, problems
from tests.distributed.ranks import Ranks
from tests.sharding.models import MODELS, Llama, batch, calls, loss_of, made, mlp


def parts_of(name: str) -> tuple[float, list[str], list[str]]:
    """Return the share of the entries that this rank holds, the blocks, and what is outside."""
    model = MODELS[name]()
    n = sum(p.numel() for p in model.parameters())
    model_fn, params = hf.functional(model, mesh=problems.mesh(2))
    mine = sum(shard.to_local().numel() for shard in params.values())
    return mine / n, list(model_fn.parts.blocks), list(model_fn.parts.outside)


def test_each_rank_holds_a_part_and_layers_are_blocks(two: Ranks) -> None:
    for share, blocks, outside in two.run(parts_of, "llama"):
        assert share == pytest.approx(0.5, abs=0.01)
        assert blocks == ["layers.0", "layers.1"]
        assert outside == ["tokens.weight", "norm.weight"]
    for _, blocks, outside in two.run(parts_of, "resnet"):
        assert blocks == ["layer1.0", "layer2.0", "layer3.0"]
        assert "bn1.weight" in outside


CHOICES = {
    "an inner module": ["layers.1.out", "layers.0"],
    "both uses of a tied weight": ["layers.*", "head", "tokens"],
    "one use of a tied weight": ["layers.*", "head"],
    "a predicate": lambda name, module: isinstance(module, nn.RMSNorm),
}


def chosen_blocks_differ_by(choice: str) -> float:
    model_fn, params = hf.functional(made(Llama))
    block = modules.random_block(params, 2)
    wanted = hf.hvp(loss_of(model_fn, "llama"))(params, batch("llama"))(block)
    model_fn, params = hf.functional(made(Llama), mesh=problems.mesh(2), shard=CHOICES[choice])
    block = modules.random_block(params, 2)
    return modules.error(hf.hvp(loss_of(model_fn, "llama"))(params, batch("llama"))(block), wanted)


@pytest.mark.parametrize("choice", CHOICES)
def test_blocks_can_be_chosen(choice: str, two: Ranks) -> None:
    assert max(two.run(chosen_blocks_differ_by, choice)) < 1e-10


def memory_is_freed() -> bool:
    model = mlp()
    weight = weakref.ref(model[0].weight)
    made = hf.functional(model, mesh=problems.mesh(2))
    del model
    gc.collect()
    return made is not None and weight() is None


def test_the_whole_model_can_be_freed(two: Ranks) -> None:
    assert all(two.run(memory_is_freed))


def unequal_parameters() -> None:
    torch.manual_seed(dist.get_rank())
    calls(nn.Sequential(nn.Linear(5, 5)))


def on_two_axes() -> None:
    mesh = problems.mesh(2, 1)
    hf.functional(fully_shard(mlp(), mesh=mesh))


def tensor_parallel_again() -> None:
    mesh = problems.mesh(2, names=("tensor",))
    hf.functional(modules.tensor_parallel("mlp", mesh), mesh=mesh)


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "batch statistics": (
        lambda: calls(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))),
        "ValueError: BatchNorm '1' uses the statistics of each batch",
    ),
    "unequal parameters": (
        unequal_parameters,
        "ValueError: the ranks disagree on parameter '0.weight'",
    ),
    "recomputed twice": (
        lambda: calls(mlp(), recompute="0"),
        "ValueError: the blocks of a sharded model are recomputed already",
    ),
    "unknown block": (
        lambda: calls(mlp(), shard="layers.*"),
        "ValueError: shard='layers.*' chooses none of the modules with parameters",
    ),
    "no list": (
        lambda: calls(Llama().layers[0]),
        "ValueError: LlamaLayer has no `nn.ModuleList` or `nn.Sequential`",
    ),
    "mesh of two axes": (
        lambda: hf.functional(mlp(), mesh=problems.mesh(2, 1)) and None,
        "ValueError: parameters are divided along one axis, but the mesh has 2",
    ),
    "model of fully_shard on two axes": (
        on_two_axes,
        "NotImplementedError: the parameters of `fully_shard` lie on a mesh of 2 axes",
    ),
    "tensor-parallel model": (
        tensor_parallel_again,
        "NotImplementedError: Sequential has DTensor parameters already",
    ),
    "predicate of nothing": (
        lambda: calls(mlp(), shard=lambda name, module: False),
        "ValueError: shard=",
    ),
}


def refusal(name: str) -> None:
    REFUSED[name][0]()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name: str, two: Ranks) -> None:
    two.refuse(REFUSED[name][1], refusal, name)


def test_a_mesh_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, not a str"):
        hf.functional(mlp(), mesh="data")  # type: ignore[arg-type]


def test_blocks_need_a_mesh() -> None:
    with pytest.raises(ValueError, match="pass `mesh=`"):
        hf.functional(mlp(), shard="0")
