"""Peak memory, measured in processes of their own."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.memory import Footprint, available_memory
from hessfunc.optim import InfinityNorm
from tests.peaks import (
    LOGITS_BYTES,
    deep_model,
    gauss_newton,
    linearised_model,
    no_examples_to_speak_of,
)
from tests.peaks import deep_model_recomputed as recomputed

pytestmark = pytest.mark.slow


def peak(job: object) -> int:
    name = getattr(job, "__name__", "")
    command = [sys.executable, "-m", "tests.peaks", name]
    root = Path(__file__).parents[1]
    # glibc keeps freed blocks of this size in its heap, where they fragment it.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_large_vocabulary_costs_no_more_than_three_logits() -> None:
    assert peak(gauss_newton) - peak(linearised_model) < 3 * LOGITS_BYTES


def test_recomputation_saves_most_of_the_graph() -> None:
    kept, again, nothing = peak(deep_model), peak(recomputed), peak(no_examples_to_speak_of)
    assert again - nothing < 0.4 * (kept - nothing)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    alone = available_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < available_memory(cpu) < 0.3 * alone


# Runs of (matvec, tree), the vectors that their docstrings say, given the length of one in float64,
# and the words that say so. A product takes two: that of the matvec, and the same in one row.
PRODUCT = 2
RUNS: dict[str, tuple[Callable[..., Any], Callable[[float], float], str]] = {
    "lanczos": (
        lambda mv, b: hf.lanczos(mv, b, k=4, rtol=0.1, seed=0),
        lambda _: (68 + 1 + 4) + 5,
        "(basis_size + block_size + k)",
    ),
    "lanczos, one pair": (
        lambda mv, b: hf.lanczos(mv, b, k=1, rtol=0.1, seed=0),
        lambda _: (62 + 1 + 1) + PRODUCT,
        "5 n more if block_size < k",
    ),
    "lanczos, near a shift": (
        lambda mv, b: hf.lanczos(
            mv, b, k=2, which="nearest", sigma=6.0, basis_size=20, max_matvecs=60, seed=0
        ),
        lambda _: 2 * 20 + 42,
        "2 basis_size + 42 vectors",
    ),
    "power_iteration": (
        lambda mv, b: hf.power_iteration(mv, b, k=3, rtol=0.1, seed=0),
        lambda _: 3 * 3 + 1 + PRODUCT,
        "2 k + 3 vectors, 3 k + 1 at the end",
    ),
    "stochastic_power_iteration": (
        lambda mv, b: hf.stochastic_power_iteration(
            mv, lambda i: mv, b, steps_per_epoch=2, rtol=0.1, max_matvecs=30, seed=0
        ),
        lambda _: 7 + PRODUCT,
        "7 vectors, besides",
    ),
    "hutchinson": (
        lambda mv, b: hf.hutchinson(mv, b, max_matvecs=20, seed=0),
        lambda wide: max(3 * 10, 2 * 10 + 5 * wide),
        "3 block_size vectors",
    ),
    "hutchinson, one by one": (
        lambda mv, b: hf.hutchinson(mv, b, max_matvecs=20, block_size=1, seed=0),
        lambda wide: max(3, 2 + 5 * wide),
        "2 block_size vectors and 5 vectors in float64",
    ),
    "hutchinson, sphere": (
        lambda mv, b: hf.hutchinson(mv, b, kind="sphere", max_matvecs=20, seed=0),
        lambda _: 3 * 10,
        "3 block_size vectors",
    ),
    "trace": (
        lambda mv, b: hf.trace(mv, b, max_matvecs=40, seed=0),
        lambda _: 4 * 40 + 4,
        "4 vectors per product",
    ),
    "hutchpp": (
        lambda mv, b: hf.hutchpp(mv, b, max_matvecs=60, seed=0),
        lambda _: 8 * 20 + 3 * 10,
        "8 vectors per probe and 3 block_size",
    ),
    "xtrace": (
        lambda mv, b: hf.xtrace(mv, b, max_matvecs=40, seed=0),
        lambda _: 9 * 20,
        "9 vectors per probe",
    ),
    "xnystrace": (
        lambda mv, b: hf.xnystrace(mv, b, max_matvecs=20, seed=0),
        lambda _: 6 * 20,
        "6 vectors per probe",
    ),
    "sampled_trace": (
        lambda mv, b: hf.sampled_trace(lambda i: mv, b, probes=10, max_matvecs=40, seed=0),
        lambda _: 3 * 10 + 2,
        "3 block_size + 2 vectors",
    ),
    "diagonal": (
        lambda mv, b: hf.diagonal(mv, b, max_matvecs=40, seed=0),
        lambda wide: (3 + 4 * wide) * 40,
        "3 vectors per product, and 4 in float64",
    ),
    "hutchinson_diagonal": (
        lambda mv, b: hf.hutchinson_diagonal(mv, b, max_matvecs=20, seed=0),
        lambda wide: (4 * 10 + 12) * wide + 10,
        "4 block_size + 12 vectors in float64",
    ),
    "hutchinson_diagonal, one by one": (
        lambda mv, b: hf.hutchinson_diagonal(mv, b, max_matvecs=20, block_size=1, seed=0),
        lambda wide: (4 + 12) * wide + 1,
        "4 block_size + 12 vectors in float64",
    ),
    "xdiag": (
        lambda mv, b: hf.xdiag(mv, b, max_matvecs=40, seed=0),
        lambda _: 9 * 20,
        "9 vectors per probe",
    ),
    "slq": (
        lambda mv, b: hf.slq(mv, b, probes=3, steps=15, seed=0),
        lambda _: 3 * (15 + 2),
        "probes * (steps + 2) vectors",
    ),
    "function": (
        lambda mv, b: hf.function(mv, torch.rsqrt, b, rtol=1e-4, basis_size=10, max_matvecs=40),
        lambda _: (10 + 8) + PRODUCT,
        "basis_size + 8 vectors",
    ),
    "logdet": (
        lambda mv, b: hf.logdet(mv, b, damping=1.0, smallest=0.0, max_matvecs=3, seed=0),
        lambda _: 35 + PRODUCT,
        "as `trace_of_function`",
    ),
    "trace_of_function": (
        lambda mv, b: hf.trace_of_function(mv, torch.exp, b, max_matvecs=3, seed=0),
        lambda _: 35 + PRODUCT,
        "3 steps + 3 vectors for the first probe, or 35",
    ),
    "generalized_sharpness": (
        lambda mv, b: hf.generalized_sharpness(mv, b, InfinityNorm().maximum, restarts=6, seed=0),
        lambda wide: 6 * (1 + 4 * wide),
        "a vector and 4 vectors in float64",
    ),
    "cg": (
        lambda mv, b: hf.cg(mv, b, rtol=1e-6),
        lambda _: 14 + PRODUCT,
        "14 vectors, besides",
    ),
    "minres": (
        lambda mv, b: hf.minres(mv, b, rtol=1e-6),
        lambda _: 23 + PRODUCT,
        "23 vectors, besides",
    ),
    "implicit_gradient": (
        lambda mv, b: hf.implicit_gradient(
            lambda p, h, batch: (p * batch).sum(),
            lambda p, h, batch: (p * mv(p[None])[0]).sum() / 2 - h * (p * batch).sum(),
            b,
            torch.ones((), dtype=b.dtype),
            outer_batches=[b],
            inner_batches=[b],
            rtol=1e-6,
            stationarity=1e9,
        ),
        lambda _: 26,
        "26 vectors with `cg`",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RUNS)
def test_memory_grows_with_the_parameters_as_is_said(name: str, dtype: torch.dtype) -> None:
    """What grows is compared, so that samples of fixed size and small matrices do not count."""
    run, vectors, words = RUNS[name]
    peaks, sizes = [], (200_000, 400_000)
    for n in sizes:
        diagonal = torch.linspace(0.1, 1, n, dtype=dtype)
        diagonal[:3] = torch.tensor([9.0, 7.0, 5.0], dtype=dtype)

        def matvec(block: Tensor, diagonal: Tensor = diagonal) -> Tensor:
            return block * diagonal

        like = torch.linspace(0.5, 1.5, n, dtype=dtype)
        with Footprint() as memory, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*met outside of the basis")
            run(matvec, like)
        peaks.append(memory.peak)
    measured = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) / dtype.itemsize
    assert vectors(8 / dtype.itemsize) == pytest.approx(measured, rel=0.2)
    said = " ".join((getattr(hf, name.partition(",")[0]).__doc__ or "").split())
    assert words in said


def test_every_algorithm_says_its_memory() -> None:
    algorithms = {
        name
        for name in hf._HOMES
        if {"max_matvecs", "run"} <= inspect.signature(getattr(hf, name)).parameters.keys()
    }
    assert algorithms == {name.partition(",")[0] for name in RUNS}


LIMITED: dict[str, Callable[..., object]] = {
    "lanczos": partial(hf.lanczos, k=20, max_matvecs=200, rtol=1e-12),
    "slq": partial(hf.slq, probes=8, steps=20),
    "xtrace": partial(hf.xtrace, max_matvecs=100, rtol=1e-9),
    "logdet": partial(hf.logdet, max_matvecs=200, rtol=1e-9),
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_run_takes_no_more_than_its_memory(name: str) -> None:
    n = 20_000
    diagonal, like = torch.linspace(0.5, 1.5, n), torch.zeros(n)
    peaks = []
    for memory in (None, 100 * 4.0 * n):
        with Footprint() as footprint, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LIMITED[name](lambda block: block * diagonal, like, seed=0, memory=memory)
        peaks.append(footprint.peak)
    assert peaks[1] < 100 * 4.0 * n < peaks[0]


def test_a_product_that_takes_more_than_half_of_the_memory_is_refused() -> None:
    model_fn, params = hf.functional(torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh()))
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    batch = torch.randn(2000, 8), torch.arange(2000) % 64
    matvec = hf.over_batches(hf.hvp(loss))(params, [batch])
    with pytest.raises(MemoryError, match="a product with 1 vectors takes .* microbatches"):
        hf.lanczos(matvec, params, k=1, memory=2e6)
    smaller = hf.over_batches(hf.hvp(loss))(params, hf.microbatches(batch, 100))
    assert hf.lanczos(smaller, params, k=1, memory=2e6, rtol=0.1, seed=0).values[0] > 0


def test_chunks_follow_from_the_memory() -> None:
    model_fn, params = hf.functional(torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh()))
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    batch = torch.randn(100, 8), torch.arange(100) % 32
    matvec, v = hf.hvp(loss)(params, batch), hf.random_like(params, 64, seed=0)
    peaks, products = [], []
    for memory in (1e9, 1e6):
        with Footprint() as footprint, hf.memory_limit(memory):
            products.append(matvec(v))
        peaks.append(footprint.peak)
    assert peaks[1] < 1e6 < peaks[0]
    for a, b in zip(products[0].values(), products[1].values(), strict=True):
        torch.testing.assert_close(a, b)
