"""Plans are what the algorithms do: every figure of them is compared with a run."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.algorithms import basis, density, lanczos
from hessfunc.algorithms.trace import xtrace
from hessfunc.distributed import sharded
from hessfunc.memory import PeakMemory
from hessfunc.plan import (
    BYTES,
    Algorithm,
    Hutchinson,
    Lanczos,
    Machine,
    Network,
    Remedy,
    Setting,
    Slq,
    Transformer,
    Xtrace,
    algorithms,
    fewest_ranks,
    memory,
    plan,
    remedies,
    whole,
)
from hessfunc.problems.gpt import GPT, next_token_loss
from hessfunc.problems.mlp import mlp
from hessfunc.trees import Space

GIB = 2**30
SEVEN = Transformer(7 * 10**9).network("float32", tokens=512, context=512)
RATES = Machine(
    gradient_seconds=1.0, memory_bandwidth=1e12, network_bandwidth=1e10, latency=1e-5
)


def sizes(width: int, dtype: torch.dtype) -> Network:
    leaves = [leaf.numel() for leaf in net(width, dtype).parameters()]
    return Network(sum(leaves), max(leaves), str(dtype).removeprefix("torch."))


def net(width: int, dtype: torch.dtype) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp([16, width, width, width, 5], torch.nn.Tanh).to(dtype)


def taken(run: Callable[..., Any], width: int, dtype: torch.dtype) -> int:
    """The bytes of all tensors at once, the parameters included."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(2, 16, generator=generator, dtype=dtype), torch.tensor([i, 4 - i]))
        for i in range(3)
    ]
    with PeakMemory() as found, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*met outside of the basis")
        model_fn, params = hf.functional(net(width, dtype))
        loss = hf.supervised(model_fn, cross_entropy)
        matvec = hf.over_batches(hf.hvp(loss, chunk_size=1))(params, batches)
        run(matvec, params, seed=0)
    return found.peak


RUNS: dict[str, tuple[Algorithm, Callable[..., Any]]] = {
    "lanczos": (Lanczos(k=4, steps=40), partial(hf.lanczos, k=4, rtol=0.1)),
    "lanczos, blocks": (
        Lanczos(k=4, steps=40, block_size=3),
        partial(hf.lanczos, k=4, block_size=3, rtol=0.1),
    ),
    "lanczos, a basis of its own": (
        Lanczos(k=2, steps=40, basis_size=30, search=2),
        partial(hf.lanczos, k=2, basis_size=30, search=2, rtol=0.1),
    ),
    "lanczos, bfloat16": (
        Lanczos(k=8, steps=60, block_size=8, basis_dtype="bfloat16"),
        partial(hf.lanczos, k=8, block_size=8, basis_dtype=torch.bfloat16, rtol=0.1),
    ),
    "slq": (Slq(probes=2, steps=12), partial(hf.slq, probes=2, steps=12)),
    "hutchinson": (Hutchinson(20), partial(hf.hutchinson, max_matvecs=20)),
    "hutchinson, one by one": (
        Hutchinson(20, 1),
        partial(hf.hutchinson, max_matvecs=20, block_size=1),
    ),
    "xtrace": (Xtrace(25), partial(hf.xtrace, max_matvecs=50)),
}


# What kernels take for themselves, as for the traces of leaves in float32, is not counted here:
# tests/distributed/test_planned.py looks at the process.
CASES = [
    (name, dtype)
    for name in RUNS
    for dtype in (torch.float32, torch.float64)
    if (name, dtype) != ("hutchinson", torch.float32)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_plan_of_one_process_is_what_it_takes(name: str, dtype: torch.dtype) -> None:
    algorithm, run = RUNS[name]
    network = sizes(80, dtype)
    found = plan(Setting(network, sharded=False), algorithm).peak
    measured = taken(run, 80, dtype)
    assert found.total == pytest.approx(measured, rel=0.15), found
