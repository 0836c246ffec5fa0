"""Products of models with parameters divided among ranks are those of the whole models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.gpt import GPT
from hessfunc.app.problems.resnet import ResNet
from hessfunc.app.problems.vit import ViT
from hessfunc.trees import tree_map
from tests.distributed import modules, problems
from tests.distributed.ranks import Ranks

VOCABULARY = 9


class LlamaLayer(nn.Module):
    """RMSNorm, rotary positions, two query heads for one key head, and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(8), nn.RMSNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, n, bias=False) for n in (8, 4, 4))
        self.out, self.gate, self.up, self.down = (
            nn.Linear(*n, bias=False) for n in ((8, 8), (8, 6), (8, 6), (6, 8))
        )

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            m(y).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        q, k = (rotated(a, angles) for a in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Llama(nn.Module):
    """Its head is tied to its embedding, and angles are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(2))
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("angles", torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.angles)
        return self.head(self.norm(x))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return make().double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: made(lambda: GPT(VOCABULARY, context=6, width=8, layers=2, heads=2)),
    "llama": lambda: made(Llama),
    "vit": lambda: made(
        lambda: ViT(size=4, patch=2, channels=1, classes=3, width=6, layers=2, heads=2)
    ),
    "resnet": lambda: made(lambda: ResNet(1, classes=3, channels=1)),
}
# Each rank has other rows; the number of examples is odd.
EXAMPLES = 5


@cache
def batch(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name in ("gpt", "llama"):
        tokens = torch.randint(VOCABULARY, (EXAMPLES, 6), generator=generator)
        return tokens, tokens.roll(-1, 1)
    size = 4 if name == "vit" else 8
    images = torch.randn(EXAMPLES, 1, size, size, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (EXAMPLES,), generator=generator)


def loss_of(model_fn: Any, name: str) -> hf.Loss:
    if name in ("vit", "resnet"):
        return hf.supervised(model_fn, F.cross_entropy)

    def outputs(params: Any, pair: tuple[Tensor, Tensor]) -> Tensor:
        return model_fn(params, tokens=pair[0]).flatten(0, 1)

    return hf.composed(outputs, F.cross_entropy, targets=lambda pair: pair[1].flatten())


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


def chosen_blocks_differ_by() -> float:
    """Whole layers, an inner module of another, and the tied head as blocks."""
    model_fn, params = hf.functional(made(Llama))
    block = modules.random_block(params, 2)
    wanted = hf.hvp(loss_of(model_fn, "llama"))(params, batch("llama"))(block)
    model_fn, params = hf.functional(
        made(Llama), mesh=problems.mesh(2), shard=["layers.1.out", "layers.0", "head", "tokens"]
    )
    block = modules.random_block(params, 2)
    return modules.error(hf.hvp(loss_of(model_fn, "llama"))(params, batch("llama"))(block), wanted)


def test_blocks_are_chosen_by_globs(two: Ranks) -> None:
    assert max(two.run(chosen_blocks_differ_by)) < 1e-10


INPUTS, LABELS = (x[:5] for x in modules.batch("mlp"))
mlp = partial(modules.model, "mlp")


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


def memory_is_freed() -> bool:
    model = mlp()
    weight = weakref.ref(model[0].weight)
    made = hf.functional(model, mesh=problems.mesh(2))
    del model
    gc.collect()
    return made is not None and weight() is None


def test_the_whole_model_can_be_freed(two: Ranks) -> None:
    assert all(two.run(memory_is_freed))


class Reads(nn.Module):
    """Computes with a weight of its block outside of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        assert self.layers[0].weight.shape == (5, 5)
        return F.linear(self.layers[0](x), self.layers[0].weight)


def calls(model: nn.Module, *inputs: Tensor, **options: Any) -> None:
    model_fn, params = hf.functional(model.double(), mesh=problems.mesh(2), **options)
    model_fn(params, *inputs or (INPUTS,))


def unequal_parameters() -> None:
    torch.manual_seed(dist.get_rank())
    calls(nn.Sequential(nn.Linear(5, 5)))


def unequal_batches() -> None:
    calls(mlp(), INPUTS + dist.get_rank())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layers(x) + y.sum()


def batches_on_the_mesh_of_the_parameters() -> None:
    mesh = problems.mesh(2)
    model_fn, params = hf.functional(mlp(), mesh=mesh)
    curvature = hf.over_batches(hf.hvp(hf.supervised(model_fn, F.cross_entropy)), mesh=mesh)
    curvature(params, [(INPUTS, LABELS)])


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "weight outside": (
        lambda: calls(Reads()),
        "RuntimeError: parameter 'layers.0.weight' is used outside of the block that gathers it",
    ),
    "dropout": (
        lambda: calls(nn.Sequential(nn.Linear(5, 5), nn.Dropout())),
        "ValueError: the model draws random numbers, such as masks of dropout",
    ),
    "batch statistics": (
        lambda: calls(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))),
        "ValueError: BatchNorm '1' uses the statistics of each batch",
    ),
    "unequal parameters": (
        unequal_parameters,
        "ValueError: the ranks disagree on parameter '0.weight'",
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
    "batches on the mesh": (
        batches_on_the_mesh_of_the_parameters,
        "ValueError: the parameters are divided among the ranks of this mesh",
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
}


def refusal(name: str) -> None:
    REFUSED[name][0]()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name: str, two: Ranks) -> None:
    for outcome in two.outcomes(refusal, name):
        assert outcome.error is not None
        assert outcome.error.startswith(REFUSED[name][1])


def test_blocks_need_a_mesh() -> None:
    with pytest.raises(ValueError, match="pass `mesh=`"):
        hf.functional(mlp(), shard="0")
