"""Plans are what the algorithms do: every figure of them is compared with a run."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.algorithms import basis, density
from hessfunc.algorithms.eigen import lanczos_state
from hessfunc.app.plan import (
    BYTES,
    Algorithm,
    Hutchinson,
    Lanczos,
    Network,
    Setting,
    Slq,
    Xtrace,
    algorithms,
    plan,
)
from hessfunc.app.plan import footprint as memory
from hessfunc.app.problems.nets import mlp
from hessfunc.memory import Footprint
from hessfunc.spaces import sharded
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space


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
    with Footprint() as found, warnings.catch_warnings():
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


def space(n: int) -> Space:
    return space_of(torch.zeros(n))


def gives(free: int) -> Callable[..., int]:
    return lambda *_: free


@pytest.mark.parametrize("vectors", [13.0, 30.0, 50.0, 200.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_a_basis_is_cut_as_lanczos_cuts_it(
    vectors: float, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = round(4000 * vectors)
    monkeypatch.setattr(lanczos_state, "available_to", gives(free))
    dtype = torch.bfloat16 if coarse else torch.float32
    asked = Lanczos(k=5, block_size=2, basis_dtype="bfloat16" if coarse else None)
    method = lanczos_state.LanczosOptions(
        k=5,
        which="LM",
        block_size=2,
        basis_size=asked.vectors,
        basis_dtype=dtype,
        basis_device=space(1000).device,
        basis_bytes=None,
        rtol=0.1,
        atol=0.0,
        search=2,
        start=None,
    )
    setting = Setting(Network(1000, 1000))
    try:
        wanted = lanczos_state.size_that_fits(lanczos_state.Problem(method, space(1000)))
    except MemoryError:
        with pytest.raises(MemoryError, match="lanczos cannot start"):
            asked.fitted(setting, free)
        return
    assert asked.fitted(setting, free).vectors == wanted


@pytest.mark.parametrize("vectors", [9, 11, 30, 45, 300])
def test_probes_are_grouped_as_slq_groups_them(
    vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 4000 * vectors
    monkeypatch.setattr(density, "available_to", gives(free))
    setting, asked = Setting(Network(1000, 1000)), Slq(probes=6, steps=10)
    try:
        wanted = density._probes_that_fit(space(1000), 6, 10, space(1000).device)
    except MemoryError:
        with pytest.raises(MemoryError, match="slq cannot start"):
            asked.fitted(setting, free)
        return
    assert asked.fitted(setting, free).at_once == wanted


def default_of(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def test_what_is_said_of_the_code_is_so() -> None:
    assert memory._GATHERED == sharded._GATHERED
    assert algorithms._CONVERTED == basis._PIECE
    for name, size in BYTES.items():
        assert getattr(torch, name).itemsize == size
    assert Lanczos().block_size == default_of(hf.lanczos, "block_size")
    assert Lanczos().search == default_of(hf.lanczos, "search")
    assert Hutchinson().block_size == default_of(hf.hutchinson, "block_size")
    assert Xtrace().block_size == default_of(hf.xtrace, "block_size")


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, hessfunc.app.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
