"""Products of models with parameters divided among ranks are those of the whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import hessfunc as hf
from hessfunc import ranks
from hessfunc.trees import tree_map
from tests.app.problems.language_models import gpt2
from tests.distributed import modules, problems
from tests.distributed.ranks import Ranks
from tests.sharding.models import INPUTS, LABELS, MODELS, batch, calls, loss_of, made, mlp

CURVATURES = {
    "hvp": hf.hvp,
    "hvp forward": partial(hf.hvp, mode="forward", chunk_size=1),
    "hvp difference": partial(hf.hvp, mode="difference"),
    "ggnvp": partial(hf.ggnvp, chunk_size=2),
    "fvp": partial(hf.fvp, chunk_size=1),
    "sampled fvp": partial(hf.fvp, samples=2, seed=3),
    "efvp": hf.efvp,
}


def differs_by(name: str, curvature: str, size: int) -> float:
    model_fn, params = hf.functional(MODELS[name]())
    block = modules.random_block(params, 4)
    of = CURVATURES[curvature]
    wanted = of(loss_of(model_fn, name))(params, batch(name))(block)
    model_fn, params = hf.functional(MODELS[name](), mesh=problems.mesh(size))
    block = modules.random_block(params, 4)
    found = of(loss_of(model_fn, name))(params, batch(name))(block)
    return modules.error(found, wanted)


# Every curvature of one model, and two of every model; the others are slow.
CASES = [
    pytest.param(name, curvature, marks=() if quick else pytest.mark.slow)
    for name in MODELS
    for curvature in CURVATURES
    for quick in [name == "vit" or curvature in ("hvp", "ggnvp")]
]


@pytest.mark.parametrize(("name", "curvature"), CASES)
def test_curvatures_are_those_of_the_whole_model(name: str, curvature: str, two: Ranks) -> None:
    bound = 1e-6 if curvature == "hvp difference" else 1e-10
    assert max(two.run(differs_by, name, curvature, 2)) < bound


def sharded_by_torch_differs_by(curvature: str) -> float:
    module = modules.fully_sharded("transformer", problems.mesh(2))
    before = [dict(vars(m)) for m in module.modules()]
    error = modules.differs_by(CURVATURES[curvature], module, "transformer")
    assert before == [dict(vars(m)) for m in module.modules()]
    return error


@pytest.mark.parametrize("curvature", ["hvp", "hvp forward", "ggnvp"])
def test_models_of_fully_shard(curvature: str, two: Ranks) -> None:
    assert max(two.run(sharded_by_torch_differs_by, curvature)) < 1e-10


def four_ranks_differ_by(name: str) -> float:
    return differs_by(name, "hvp", 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_on_four_ranks(name: str, four: Ranks) -> None:
    assert max(four.run(four_ranks_differ_by, name)) < 1e-10


def algorithms_differ_by() -> list[float]:
    loss, params = modules.loss_of(mlp())
    plain = hf.ggnvp(loss)(params, (INPUTS, LABELS))
    model_fn, shards = hf.functional(mlp(), mesh=problems.mesh(2))
    matvec = hf.ggnvp(hf.supervised(model_fn, F.cross_entropy))(shards, (INPUTS, LABELS))
    found = hf.lanczos(matvec, shards, k=2, rtol=1e-8, seed=1)
    wanted = hf.lanczos(plain, params, k=2, rtol=1e-8, seed=1)
    run: dict[str, Any] = {"max_matvecs": 8, "seed": 2}
    density = {"probes": 1, "steps": 6, "seed": 3}
    b = tree_map(lambda block: block[0], modules.random_block(params, 1))
    sharded_b = tree_map(lambda block: block[0], modules.random_block(shards, 1))
    damped, plain_damped = hf.matvecs.shift(matvec, 0.1), hf.matvecs.shift(plain, 0.1)
    return [
        float((found.values - wanted.values).abs().max()),
        abs(hf.trace(matvec, shards, **run).value - hf.trace(plain, params, **run).value),
        float(
            (hf.slq(matvec, shards, **density).nodes - hf.slq(plain, params, **density).nodes)
            .abs()
            .max()
        ),
        modules.error(hf.cg(damped, sharded_b, rtol=1e-10).x, hf.cg(plain_damped, b, rtol=1e-10).x),
    ]


def test_algorithms_are_unchanged(two: Ranks) -> None:
    for errors in two.run(algorithms_differ_by):
        assert max(errors) < 1e-7


def rounded_differs_by() -> float:
    """A model evaluated in a narrower dtype."""
    model_fn, params = hf.functional(mlp(), dtype=torch.float32)
    block = modules.random_block(params, 2)
    wanted = hf.ggnvp(hf.supervised(model_fn, F.cross_entropy))(params, (INPUTS, LABELS))(block)
    model_fn, params = hf.functional(mlp(), dtype=torch.float32, mesh=problems.mesh(2))
    loss = hf.supervised(model_fn, F.cross_entropy)
    block = modules.random_block(params, 2)
    return modules.error(hf.ggnvp(loss)(params, (INPUTS, LABELS))(block), wanted)


def test_models_in_another_dtype(two: Ranks) -> None:
    assert max(two.run(rounded_differs_by)) < 1e-6


def narrow_differs_by(how: str) -> tuple[float, set[torch.dtype]]:
    """Weights in 16 bits beside the widened model, and the dtypes of what is gathered."""
    inputs = INPUTS.float()
    narrow = mlp().bfloat16()
    model_fn, params = hf.functional(copy.deepcopy(narrow).float())
    block = modules.random_block(params, 2)
    loss = hf.supervised(model_fn, F.cross_entropy)
    wanted = hf.ggnvp(loss)(params, (inputs, LABELS))(block)
    mesh = problems.mesh(2)
    of_torch = how == "fully_shard"
    model = fully_shard(narrow, mesh=mesh) if of_torch else narrow
    options = {} if of_torch else {"mesh": mesh}
    model_fn, params = hf.functional(model, dtype=torch.float32, **options)
    with patch.object(ranks, "_all_gather", wraps=ranks._all_gather) as gather:
        assert model_fn(params, inputs).dtype == torch.float32
    sent = {call.args[0].dtype for call in gather.call_args_list}
    loss = hf.supervised(model_fn, F.cross_entropy)
    block = modules.random_block(params, 2)
    found = hf.ggnvp(loss)(params, (inputs, LABELS))(block)
    assert {leaf.dtype for leaf in found.values()} == {torch.float32}
    return modules.error(found, wanted), sent


@pytest.mark.parametrize("how", ["mesh", "fully_shard"])
def test_models_in_16_bits_compute_in_float32(how: str, two: Ranks) -> None:
    for error, sent in two.run(narrow_differs_by, how):
        assert error < 1e-5
        # Weights travel as they are stored; outputs are joined.
        assert torch.bfloat16 in sent


def text(examples: int) -> dict[str, Tensor]:
    ids = torch.arange(examples * 6).view(-1, 6) * 7 % 50
    # The ranks have different numbers of labels.
    return {"input_ids": ids, "labels": ids.where(torch.arange(examples)[:, None] < 2, -100)}


def language_model() -> nn.Module:
    return made(lambda: gpt2(50))


def language_model_differs_by(curvature: str, examples: int) -> float:
    of, batch = CURVATURES[curvature], text(examples)
    loss, params = hf.language_model_loss(language_model())
    block = modules.random_block(params, 2)
    wanted, value = of(loss)(params, batch)(block), loss(params, batch)
    loss, params = hf.language_model_loss(language_model(), mesh=problems.mesh(2))
    block = modules.random_block(params, 2)
    found = of(loss)(params, batch)(block)
    return max(modules.error(found, wanted), abs(float(loss(params, batch) / value - 1)))


# A single example is not divided: the hidden states of all rows are joined.
@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("curvature", ["hvp", "ggnvp", "sampled fvp", "efvp"])
def test_language_models_without_logits(curvature: str, examples: int, two: Ranks) -> None:
    pytest.importorskip("transformers")
    assert max(two.run(language_model_differs_by, curvature, examples)) < 1e-10


def unequal_batches() -> None:
    calls(mlp(), INPUTS + dist.get_rank())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layers(x) + y.sum()


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y - y.mean(0)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(5, 3)]).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)[0]
        return y


def coupled_in_the_loss() -> None:
    model_fn, params = hf.functional(mlp(), mesh=problems.mesh(2))
    loss = hf.supervised(lambda p, x: model_fn(p, x - x.mean(0)), F.cross_entropy)
    hf.hvp(loss)(params, (INPUTS, LABELS))


def time_before_batch() -> None:
    model_fn, params = hf.functional(TimeFirst(), mesh=problems.mesh(2))
    inputs = torch.ones(4, 2, 5, dtype=torch.float64)
    hf.ggnvp(hf.supervised(model_fn, F.mse_loss))(params, (inputs, inputs[..., :3]))


def posterior() -> None:
    model_fn, params = hf.functional(mlp(), mesh=problems.mesh(2))
    hf.laplace(hf.supervised(model_fn, F.cross_entropy), params, [(INPUTS, LABELS)])


def batches_on_the_mesh_of_the_parameters() -> None:
    mesh = problems.mesh(2)
    model_fn, params = hf.functional(mlp(), mesh=mesh)
    curvature = hf.over_batches(hf.hvp(hf.supervised(model_fn, F.cross_entropy)), mesh=mesh)
    curvature(params, [(INPUTS, LABELS)])


_COUPLED = "ValueError: the outputs of one example depend on other examples of the batch"


def language_model_of_fully_shard() -> None:
    hf.language_model_loss(fully_shard(language_model(), mesh=problems.mesh(2)))


def head_in_a_block() -> None:
    hf.language_model_loss(language_model(), mesh=problems.mesh(2), shard="lm_head")


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "language model of fully_shard": (
        language_model_of_fully_shard,
        "NotImplementedError: the parameters of FSDPGPT2LMHeadModel are DTensors",
    ),
    "head in a block": (
        head_in_a_block,
        "ValueError: shard='lm_head' chooses 'lm_head', which has the output embedding",
    ),
    "dropout": (
        lambda: calls(nn.Sequential(nn.Linear(5, 5), nn.Dropout())),
        "ValueError: the model draws random numbers, such as masks of dropout",
    ),
    "unequal batches": (unequal_batches, "ValueError: the ranks disagree on the whole batch"),
    "outputs without examples": (
        lambda: calls(nn.Sequential(nn.Linear(5, 5), nn.Flatten(0))),
        "ValueError: an output of the model has shape",
    ),
    "inputs of two lengths": (
        lambda: calls(TwoInputs(), INPUTS, INPUTS[:2]),
        "ValueError: a batch is divided among ranks along the first axes of its arrays, but",
    ),
    "coupled rows": (lambda: calls(Centred()), _COUPLED),
    "coupled rows of a loss": (coupled_in_the_loss, _COUPLED),
    "time before batch": (time_before_batch, _COUPLED),
    "posterior": (posterior, "NotImplementedError: posteriors do not support DTensor parameters"),
    "batches on the mesh": (
        batches_on_the_mesh_of_the_parameters,
        "ValueError: the parameters are divided among the ranks of this mesh",
    ),
}


def refusal(name: str) -> None:
    REFUSED[name][0]()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name: str, two: Ranks) -> None:
    two.refuse(REFUSED[name][1], refusal, name)
