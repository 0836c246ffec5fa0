"""A run killed at any moment and started again gives the bits of one that was never killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc import files
from hessfunc.optim import InfinityNorm, LargestNorm, SpectralNorm
from tests.algorithms.checkpoint.forks import forked
from tests.algorithms.checkpoint.problem import LIKE, MATRIX, N, run_lanczos, same

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


RIGHT = {"a": torch.ones(3, 5).double(), "b": torch.ones(N - 15).double()}
BLOCK = {name: torch.stack([leaf, leaf.cumsum(0)]) for name, leaf in RIGHT.items()}

NORM = LargestNorm({"a": SpectralNorm(), "b": InfinityNorm(2.0)})
RUNS: dict[str, Callable[[Any, Path], Any]] = {
    "hutchinson": lambda matvec, path: hf.hutchinson(
        matvec, LIKE, max_matvecs=20, block_size=5, checkpoint=path, seed=1
    ),
    "trace": lambda matvec, path: hf.trace(matvec, LIKE, max_matvecs=10, checkpoint=path, seed=1),
    "hutchpp": lambda matvec, path: hf.hutchpp(
        matvec, LIKE, max_matvecs=24, block_size=4, checkpoint=path, seed=1
    ),
    "xtrace": lambda matvec, path: hf.xtrace(
        matvec, LIKE, max_matvecs=24, block_size=4, checkpoint=path, seed=1
    ),
    "xnystrace": lambda matvec, path: hf.xnystrace(
        matvec, LIKE, max_matvecs=15, block_size=5, checkpoint=path, seed=1
    ),
    "diagonal": lambda matvec, path: hf.diagonal(
        matvec, LIKE, max_matvecs=10, checkpoint=path, seed=1
    ),
    "hutchinson_diagonal": lambda matvec, path: hf.hutchinson_diagonal(
        matvec, LIKE, max_matvecs=20, block_size=5, checkpoint=path, seed=1
    ),
    "xdiag": lambda matvec, path: hf.xdiag(
        matvec, LIKE, max_matvecs=24, block_size=4, checkpoint=path, seed=1
    ),
    "lanczos": lambda matvec, path: hf.lanczos(
        matvec, LIKE, k=1, basis_size=3, rtol=1e-2, checkpoint=path, seed=1
    ),
    "block lanczos": lambda matvec, path: hf.lanczos(
        matvec, LIKE, k=3, block_size=2, which="LA", rtol=1e-1, checkpoint=path, seed=1
    ),
    "lanczos in bfloat16": lambda matvec, path: hf.lanczos(
        matvec,
        LIKE,
        k=1,
        basis_size=3,
        basis_dtype=torch.bfloat16,
        rtol=1e-2,
        checkpoint=path,
        seed=1,
    ),
    "power_iteration": lambda matvec, path: hf.power_iteration(
        matvec, LIKE, k=2, rtol=3e-2, checkpoint=path, seed=1
    ),
    "cg": lambda matvec, path: hf.cg(matvec, RIGHT, damping=0.1, rtol=1e-3, checkpoint=path),
    "minres": lambda matvec, path: hf.minres(
        matvec, RIGHT, damping=0.2, rtol=1e-2, checkpoint=path
    ),
    "cg of a block": lambda matvec, path: hf.cg(
        matvec, BLOCK, like=LIKE, damping=0.1, rtol=1e-3, checkpoint=path
    ),
    "minres of a block": lambda matvec, path: hf.minres(
        matvec, BLOCK, like=LIKE, damping=0.2, rtol=1e-2, checkpoint=path
    ),
    "logdet": lambda matvec, path: hf.logdet(
        matvec, LIKE, damping=50.0, max_matvecs=20, checkpoint=path, seed=1
    ),
    "function": lambda matvec, path: hf.function(
        matvec, torch.atan, RIGHT, rtol=1e-2, basis_size=3, checkpoint=path
    ),
    "sampled_trace": lambda matvec, path: hf.sampled_trace(
        lambda i: matvec if i % 2 else hf.matvecs.scale(matvec, 3),
        LIKE,
        probes=2,
        max_matvecs=60,
        checkpoint=path,
        seed=1,
    ),
    "stochastic_power_iteration": lambda matvec, path: hf.stochastic_power_iteration(
        matvec, lambda i: matvec, LIKE, steps_per_epoch=2, rtol=5e-2, checkpoint=path, seed=1
    ),
    "generalized_sharpness": lambda matvec, path: hf.generalized_sharpness(
        matvec, LIKE, NORM, restarts=2, rtol=1e-2, checkpoint=path, seed=1
    ),
    "slq": lambda matvec, path: hf.slq(matvec, LIKE, probes=2, steps=25, checkpoint=path, seed=1),
}


class States:
    """The states of a directory at which a run may die: before every call that changes the disk."""

    def __init__(self, directory: Path, kept: Path) -> None:
        self.directory = directory
        self.kept = kept
        self.seen: list[dict[str, bytes]] = []

    def install(self) -> None:
        for name in ("fsync", "replace", "unlink", "mkdir"):
            setattr(os, name, self._before(getattr(os, name)))
        whole = files.write_whole

        def torn(path: Path, write: Callable[[BinaryIO], object]) -> None:
            part = path.with_name(path.name + ".part")
            with part.open("wb") as file:
                write(file)
                file.truncate(file.tell() // 2)
            self.keep()
            part.unlink()
            whole(path, write)

        files.write_whole = torn

    def keep(self) -> None:
        """Copy the directory, unless a copy with the same bytes is there."""
        if not self.directory.exists():
            return
        state = {file.name: file.read_bytes() for file in self.directory.iterdir()}
        if state not in self.seen:
            self.seen.append(state)
            copy = self.kept / str(len(self.seen))
            copy.mkdir(parents=True)
            for name, content in state.items():
                (copy / name).write_bytes(content)

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **kwargs: Any) -> Any:
            self.keep()
            return call(*args, **kwargs)

        return kept


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_write_boundary_it_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    run, matvec = RUNS[name], hf.dense(MATRIX)
    uninterrupted = run(matvec, tmp_path / "whole")

    def recorded() -> None:
        States(tmp_path / "recorded", tmp_path / "states").install()
        run(matvec, tmp_path / "recorded")

    # A process that has ended holds the lock of each state.
    child = forked(recorded)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    states = list((tmp_path / "states").iterdir())
    assert len(states) > 20
    for state in states:
        assert same(run(matvec, state), uninterrupted)
        assert not list(state.glob("*.part"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_kill_9_in_the_middle(name: str, tmp_path: Path) -> None:
    run, matvec = RUNS[name], hf.dense(MATRIX)
    uninterrupted = run(matvec, tmp_path / "whole")

    path = tmp_path / "killed"

    def endless(block: Any) -> Any:
        # However late the kill comes, the run has not ended.
        if (path / "manifest.json").exists():
            time.sleep(600)
        return matvec(block)

    child = forked(lambda: run(endless, path))
    deadline = time.monotonic() + 100
    while not (path / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    calls = 0

    def counted(block: Any) -> Any:
        nonlocal calls
        calls += 1
        return matvec(block)

    assert same(run(counted, path), uninterrupted)
    # One product is made again; the rounds before the kill are not.
    assert calls - 1 < uninterrupted.passes


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_read_back(name: str, tmp_path: Path) -> None:
    run, matvec = RUNS[name], hf.dense(MATRIX)
    first = run(matvec, tmp_path / "state")
    files = sorted(file.name for file in (tmp_path / "state").iterdir())
    assert same(run(matvec, tmp_path / "state"), first)
    assert sorted(file.name for file in (tmp_path / "state").iterdir()) == files


def test_a_larger_budget_goes_on(tmp_path: Path) -> None:
    options = {"seed": 3, "checkpoint": tmp_path / "state"}
    hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, **options)
    more = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=35, **options)
    fresh = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=35, seed=3)
    assert same(more, fresh)


def test_a_drawn_seed_is_taken_up_again(tmp_path: Path) -> None:
    first = hf.xtrace(hf.dense(MATRIX), LIKE, max_matvecs=10, checkpoint=tmp_path / "state")
    again = hf.xtrace(hf.dense(MATRIX), LIKE, max_matvecs=10, checkpoint=tmp_path / "state")
    assert again.seed == first.seed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 3}, "k was 2 and is 3 now"),
        ({"seed": 2}, "seed was 1 and is 2 now"),
        ({"like": torch.zeros(N).double()}, "leaves was"),
        ({"matvec": hf.dense(MATRIX + 0.1)}, "belongs to another matrix, whose matrix differ"),
        ({"matvec": lambda block: hf.dense(MATRIX + 0.1)(block)}, "belongs to another matrix"),
        ({"start": LIKE | {"b": torch.ones(N - 15).double()}}, "start was None"),
    ],
)
def test_the_state_of_another_run_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first = run_lanczos(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        run_lanczos(tmp_path, **changed)
    assert "\n" not in str(refusal.value)
    assert same(run_lanczos(tmp_path), first)


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    run_lanczos(tmp_path)
    with pytest.raises(ValueError, match="algorithm was Lanczos and is XTrace now"):
        hf.xtrace(hf.dense(MATRIX), LIKE, checkpoint=tmp_path)


def test_a_run_that_fails_before_its_first_state_leaves_no_file(tmp_path: Path) -> None:
    def fails(block: Any) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_lanczos(tmp_path / "state", matvec=fails)
    assert not list((tmp_path / "state").iterdir())


def bfloat16_problem() -> tuple[Any, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(10, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)
    ).bfloat16()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(lambda p, x: model_fn(p, x).float(), torch.nn.functional.cross_entropy)
    return (
        hf.hvp(loss, chunk_size=1),
        params,
        (torch.randn(32, 10).bfloat16(), torch.arange(32) % 4),
    )


def opaque(matvec: Any) -> Any:
    return lambda block: matvec(block)


@pytest.mark.parametrize("wrapped", [opaque, lambda matvec: matvec])
@pytest.mark.parametrize("by", [1.08, 0.97])
def test_other_parameters_in_bfloat16_are_refused(wrapped: Any, by: float, tmp_path: Path) -> None:
    curvature, params, batch = bfloat16_problem()
    options = {"max_matvecs": 8, "seed": 1, "block_size": 4, "checkpoint": tmp_path}
    other = {name: (leaf.float() * by).bfloat16() for name, leaf in params.items()}
    first = hf.hutchinson(wrapped(curvature(params, batch)), params, **options)
    with pytest.raises(ValueError, match="belongs to another matrix"):
        hf.hutchinson(wrapped(curvature(other, batch)), params, **options)
    assert same(hf.hutchinson(wrapped(curvature(params, batch)), params, **options), first)


@pytest.mark.parametrize("kind", ["parameters", "batches"])
@pytest.mark.parametrize(
    "made_of",
    [
        lambda matvec: matvec,
        lambda matvec: hf.matvecs.shift(hf.matvecs.scale(matvec, 2.0), 1.0),
        lambda matvec: hf.matvecs.add(lambda block: block, matvec),
    ],
)
def test_one_bit_of_another_problem_is_refused(kind: str, made_of: Any, tmp_path: Path) -> None:
    curvature, params, batch = bfloat16_problem()
    options = {"max_matvecs": 8, "seed": 1, "checkpoint": tmp_path}
    curvature = hf.over_batches(curvature)
    hf.hutchinson(made_of(curvature(params, [batch])), params, **options)
    if kind == "parameters":
        params = {name: leaf.clone() for name, leaf in params.items()}
        params["2.bias"].view(torch.int16)[1] ^= 1
    else:
        batch = (batch[0], batch[1].clone())
        batch[1][:2] = batch[1][:2].flip(0)
    with pytest.raises(ValueError, match=f"whose {kind} differ"):
        hf.hutchinson(made_of(curvature(params, [batch])), params, **options)


def test_examples_may_be_cut_into_other_batches(tmp_path: Path) -> None:
    curvature, params, (x, y) = bfloat16_problem()
    curvature = hf.over_batches(curvature)
    params = {name: leaf.double() for name, leaf in params.items()}
    order = torch.randperm(32)
    batches = [(x.double(), y)], hf.microbatches((x.double()[order], y[order]), 5)
    first, again = (
        hf.hutchinson(curvature(params, b), params, max_matvecs=8, seed=1, checkpoint=tmp_path)
        for b in batches
    )
    assert again.value == first.value


def test_a_run_resumes_on_a_processor_that_rounds_otherwise(tmp_path: Path) -> None:
    like = torch.zeros(N)

    def product(block: Tensor, noise: float = 0.0) -> Tensor:
        # The rounding of this matvec is 1e-5, hundred times that of its dtype.
        exact = block.double() @ MATRIX
        scatter = torch.sin(1e5 * exact + 1e3 * noise)
        return (exact * (1 + 1e-5 * scatter)).float()

    options = {"max_matvecs": 10, "seed": 1, "checkpoint": tmp_path}
    first = hf.hutchinson(product, like, **options)
    assert same(hf.hutchinson(lambda block: product(block, 1.0), like, **options), first)
    with pytest.raises(ValueError, match="belongs to another matrix"):
        hf.hutchinson(lambda block: 1.001 * product(block), like, **options)


def test_a_block_of_products_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    model_fn, params = hf.functional(model.double())
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    batch = (torch.randn(8, 5).double(), torch.randint(3, (8,)))
    options = {"seed": 1, "block_size": 8, "checkpoint": tmp_path}
    first = hf.hutchinson(hf.hvp(loss)(params, batch), params, max_matvecs=24, **options)
    again = hf.hutchinson(hf.hvp(loss)(params, batch), params, max_matvecs=32, **options)
    assert torch.equal(again.samples[:24], first.samples)


def test_a_run_that_made_no_product_goes_on(tmp_path: Path) -> None:
    hf.cg(hf.dense(MATRIX), RIGHT, damping=0.1, max_matvecs=1, checkpoint=tmp_path)
    found = hf.cg(hf.dense(MATRIX), RIGHT, damping=0.1, checkpoint=tmp_path)
    assert found.converged


def test_a_fork_computes_after_threads_have_begun() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        large = torch.ones(2_000_000)
        large.exp().sum()
        child = forked(lambda: large.exp().sum())
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
    finally:
        torch.set_num_threads(before)
