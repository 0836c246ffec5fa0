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
from hessfunc.algorithms.eigen import recurrence
from hessfunc.app.plan import (
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
    gradient_seconds,
    plan,
    remedies,
    whole,
)
from hessfunc.app.plan import footprint as memory
from hessfunc.app.problems.gpt import GPT, next_token_loss
from hessfunc.app.problems.nets import mlp
from hessfunc.memory import Footprint
from hessfunc.spaces import sharded
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space

GIB = 2**30
SEVEN = Transformer.usual(7 * 10**9).network("float32", tokens=512, context=512)
RATES = Machine(gradient_seconds=1.0, memory_bandwidth=1e12, network_bandwidth=1e10, latency=1e-5)


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
    monkeypatch.setattr(recurrence, "available_to", gives(free))
    dtype = torch.bfloat16 if coarse else torch.float32
    asked = Lanczos(k=5, block_size=2, basis_dtype="bfloat16" if coarse else None)
    method = recurrence.LanczosOptions(
        k=5,
        which="LM",
        block_size=2,
        basis_size=asked.vectors,
        basis_dtype=dtype,
        basis_device=space(1000).device,
        basis_bytes=None,
        rtol=0.1,
        atol=0.0,
        search=8,
        start=None,
    )
    setting = Setting(Network(1000, 1000))
    try:
        wanted = recurrence.size_that_fits(recurrence.Problem(method, space(1000)))
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


def test_vectors_alone_are_divided_by_ranks() -> None:
    network = Network(10**6, 10**5)
    one, four = (plan(Setting(network, ranks), Slq(steps=50)).peak.held for ranks in (1, 4))
    assert one["basis"] == 4 * four["basis"] == 49 * 4 * 10**6
    assert one["parameters"] == four["parameters"]
    assert one["sum over batches"] == four["sum over batches"] == 4 * (10**6 + 2)
    whole_on_each = plan(Setting(network, 4, sharded=False), Slq(steps=50)).peak.held
    assert whole_on_each["basis"] == one["basis"]


def test_a_ring_sends_each_sum_twice_and_each_block_once() -> None:
    network = Network(10**6, 10**5)
    cost = RATES.cost(Setting(network, 4), 3)
    assert cost.reduced == 2 * 3 / 4 * (3 * 10**6 + 2) * 4
    assert cost.gathered == 3 / 4 * 3 * 10**6 * 4
    assert RATES.cost(Setting(network, 4, sharded=False), 3).gathered == 0
    alone = RATES.cost(Setting(network, 1), 3, Lanczos(block_size=3).work(Setting(network, 1)))
    assert (alone.sent, alone.wire) == (0, 0)
    assert alone.products == 1 + 2 * 3


def test_a_run_is_its_steps_and_its_checks() -> None:
    setting, algorithm = Setting(SEVEN, 64), Lanczos(k=10, steps=100)
    work = algorithm.work(setting)
    assert work.products == 100 + 1 + 10 + 8
    run = RATES.in_all(setting, work)
    step, check = RATES.cost(setting, 1, work), RATES.cost(setting, 1)
    assert run.seconds == pytest.approx(100 * step.seconds + 19 * check.seconds)
    assert run.sent == pytest.approx(100 * step.sent + 19 * check.sent)


def test_a_gradient_takes_six_operations_a_parameter_and_token() -> None:
    assert gradient_seconds(10**9, 10**6, 1e15) == 6


def test_every_step_reads_the_basis_four_times() -> None:
    setting = Setting(Network(10**6, 10**5))
    vectors = Lanczos(k=5, basis_size=20, steps=20).work(setting).traffic / (4 * 10**6)
    assert vectors == 4 * sum(range(1, 21))
    assert Slq(probes=2, steps=9).work(setting).traffic / (4 * 10**6) == 2 * 4 * sum(range(1, 10))


def test_the_fewest_ranks_fit_and_one_less_does_not() -> None:
    setting = Setting(Transformer.usual(10**9).network("bfloat16", tokens=512, context=512))
    run = Remedy("", setting, Slq(probes=4, steps=100))
    fewest = fewest_ranks(run, 40 * GIB)
    assert fewest is not None
    assert fewest > 1
    assert run.on(fewest).fits(40 * GIB)
    assert not run.on(fewest - 1).fits(40 * GIB)
    assert fewest_ranks(run, GIB) is None
    assert whole(setting, run.algorithm) > GIB


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("algorithm", [Lanczos(), Slq(probes=2), Hutchinson(), Xtrace()])
def test_each_remedy_takes_less_and_all_take_the_least(algorithm: Algorithm, ranks: int) -> None:
    setting = Setting(SEVEN, ranks, sharded=False)
    peaks = [remedy.peak for remedy in remedies(setting, algorithm)]
    assert len(peaks) > 2
    assert max(peaks) < plan(setting, algorithm).peak.total
    assert min(peaks) == peaks[-1]


def test_remedies_that_were_taken_are_not_named_again() -> None:
    setting = Setting(SEVEN.in_bfloat16().computed_again(), 8)
    algorithm = Lanczos(basis_dtype="bfloat16", basis_size=12)
    found = [remedy.how for remedy in remedies(setting, algorithm)]
    assert found == ["the basis in host memory", "all of these"]


@pytest.mark.parametrize(
    ("params", "layers", "width"),
    [(85_054_464, 12, 768), (6_442_450_944, 32, 4096), (68_700_000_000, 80, 8192)],
)
def test_the_usual_shape_is_near_that_of_known_models(params: int, layers: int, width: int) -> None:
    shape = Transformer.usual(params)
    assert 12 * shape.layers * shape.width**2 == pytest.approx(params, rel=0.01)
    assert shape.layers * shape.width == pytest.approx(layers * width, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, "layers.*"])
def test_the_graph_of_a_transformer_is_as_large_as_is_said(recompute: str | None) -> None:
    """Of a net of other sizes than those that the constants were fitted to."""
    vocabulary, context, width, layers, heads = 800, 96, 256, 5, 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(vocabulary, context, width, layers, heads, tied=False)
    model_fn, params = hf.functional(model, recompute=recompute)
    loss = hf.composed(model_fn, next_token_loss)
    tokens = torch.randint(vocabulary, (4, context), generator=torch.Generator().manual_seed(1))
    vector = hf.random_like(params, 1, seed=0)
    with Footprint() as found:
        hf.hvp(loss)(params, tokens)(vector)
    sizes = [leaf.numel() for leaf in params.values()]
    n, largest = sum(sizes), max(sizes)
    shape = Transformer(n, layers, width, heads, vocabulary)
    numbers = shape.numbers(4 * context, context, recompute=recompute is not None)
    assert numbers == pytest.approx(found.peak / 4 - 2 * n - 2 * largest, rel=0.15)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="choose bfloat16, float16, float32, float64"):
        Network(10, 5, "int8")
    with pytest.raises(ValueError, match="the largest leaf must have 1 to 10 entries"):
        Network(10, 11)
    with pytest.raises(ValueError, match="at least one rank is required"):
        Setting(Network(10, 5), 0)
    with pytest.raises(ValueError, match="at least k \\+ 2 block_size = 12"):
        Lanczos(k=10, basis_size=11)
    with pytest.raises(ValueError, match="choose bfloat16, float32 or float64"):
        Lanczos(basis_dtype="float16")


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, hessfunc.app.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
