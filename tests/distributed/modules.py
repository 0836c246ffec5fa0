"""An MLP and a transformer, sharded in every way that torch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.trees import leaves

TRANSFORMERS = ["transformer", "transformer, fused attention"]
MODELS = ["mlp", *TRANSFORMERS]
WIDTH, HEADS, WORDS, CLASSES = 8, 4, 11, 3


class Attention(nn.Module):
    """Of as many heads as this rank has."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.query, self.key, self.value)
        q, k, v = (m(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for m in maps)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax(q @ k.mT / (WIDTH // HEADS) ** 0.5, dim=-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(fused=fused)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Layer(fused=fused)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def model(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name == "mlp":
        sizes = (5, WIDTH, CLASSES)
        return nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).double()
    return Transformer(fused="fused" in name).double()


def batch(name: str, *, seed: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (8,), generator=generator)
    if name == "mlp":
        return torch.randn(8, 5, dtype=torch.float64, generator=generator), targets
    return torch.randint(WORDS, (8, 4), generator=generator), targets


def loss_of(module: nn.Module) -> tuple[hf.Loss, dict[str, Tensor]]:
    model_fn, params = hf.functional(module)
    return hf.supervised(model_fn, F.cross_entropy), params


def distributed(name: str, mesh: DeviceMesh) -> nn.Module:
    """Of DTensors alone, their first axes cut; but tables of words, along the other."""

    def cut(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        axis = 1 if isinstance(module, nn.Embedding) else 0
        for key, parameter in list(module.named_parameters(recurse=False)):
            shards = distribute_tensor(parameter.data, mesh, [Shard(axis)])
            module.register_parameter(key, nn.Parameter(shards))

    def on_mesh(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return tuple(distribute_tensor(x, mesh, [Replicate()]) for x in inputs)

    def whole(_: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        return outputs.full_tensor()

    return distribute_module(model(name), mesh, cut, on_mesh, whole)


def tensor_parallel(name: str, mesh: DeviceMesh, *, sequence: bool = False) -> nn.Module:
    if name == "mlp":
        return parallelize_module(
            model(name), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )
    columns = [*(f"attention.{x}" for x in ("query", "key", "value")), "up"]
    plan: dict[str, Any] = {f"layers.0.{x}": ColwiseParallel() for x in columns}
    plan |= {f"layers.0.{x}": RowwiseParallel() for x in ("attention.out", "down")}
    if sequence:
        plan["layers.0"] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1)
        )
        plan["norm"] = SequenceParallel(use_local_output=False)
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model(name), mesh, plan)


def fully_sharded(name: str, mesh: DeviceMesh) -> nn.Module:
    module = model(name)
    if name == "mlp":
        return fully_shard(module, mesh=mesh)
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def whole(leaf: Tensor) -> Tensor:
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def error(found: Any, wanted: Any) -> float:
    """The largest relative difference of the leaves of two trees, DTensors or not."""
    pairs = zip((x.detach() for x in leaves(found)), leaves(wanted), strict=True)
    size = max(float(b.abs().max()) for b in leaves(wanted))
    return max(float((whole(a) - b).abs().max()) / size for a, b in pairs)


def differs_by(
    curvature: Callable[[hf.Loss], Any], sharded: nn.Module, name: str, *, k: int = 3
) -> float:
    """How far the products of a sharded module are from those of the module itself."""
    loss, params = loss_of(model(name))
    wanted = curvature(loss)(params, batch(name))(random_block(params, k))
    loss, params = loss_of(sharded)
    return error(curvature(loss)(params, batch(name))(random_block(params, k)), wanted)


def random_block(params: Any, k: int) -> Any:
    return hf.random_like(params, k, kind="normal", seed=5)


def runs_differ_by(matvec: Any, params: Any, name: str) -> tuple[float, float]:
    """How far eigenvalues and a trace are from those of the module that is not sharded."""
    loss, like = loss_of(model(name))
    plain = hf.hvp(loss)(like, batch(name))
    found = hf.lanczos(matvec, params, k=2, rtol=1e-6, max_matvecs=20, seed=6).values
    wanted = hf.lanczos(plain, like, k=2, rtol=1e-6, max_matvecs=20, seed=6).values
    trace = hf.hutchinson(matvec, params, max_matvecs=8, seed=7).value
    return (
        float((found - wanted).abs().max() / wanted.abs().max()),
        abs(trace - hf.hutchinson(plain, like, max_matvecs=8, seed=7).value),
    )
