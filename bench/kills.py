"""Runs that are killed by SIGKILL at random moments, and started again.

    python -m bench.kills [--kills 50]              # runs of one process
    python -m bench.kills --ranks 3 [--kills 100]   # runs on up to three ranks

Each trial starts a run in a forked process, or in one for each rank, and kills it after a random
delay from a random round on: between products, in a product or while a checkpoint is written. On
ranks, one of them is killed, the others must stop by themselves and say why, and the next attempt
has another number of ranks. Results of a single process must have the bits of an uninterrupted run;
on ranks, they must agree up to rounding, because sums have another order.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.tracking.measure import Point
from hessfunc.tracking.writers import json_lines, read

# Called with the folder of the checkpoint, the mesh, and a callback for each round.
Run: TypeAlias = Callable[[Path, Any, Callable[[Any], None]], Any]
TIMEOUT = 30
# Longest delay of a kill, in seconds after a round; a round takes a few milliseconds.
DELAY = 0.05
_LOST = "lost contact with the other ranks"


def problem() -> tuple[hf.Loss, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Return a loss, its parameters and batches of uneven sizes, equal in every process."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model_fn, params = hf.functional(model)
    batches = [
        (
            torch.randn(size, 4, dtype=torch.float64, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for size in (5, 3, 4, 1, 6, 2, 5)
    ]
    return hf.supervised(model_fn, cross_entropy), params, batches


def algorithm(name: str, curvature: Any = hf.hvp, **options: Any) -> Run:
    """Return the run of an algorithm of the top level on a curvature matrix of the problem."""

    def run(folder: Path, mesh: Any, callback: Callable[[Any], None]) -> Any:
        loss, params, batches = problem()
        matvec = hf.over_batches(curvature(loss), mesh=mesh)(params, batches)
        space = None if mesh is None else hf.sharded(params, mesh)
        given = (torch.atan, params) if name == "function" else (params,)
        return getattr(hf, name)(
            matvec, *given, space=space, checkpoint=folder, callback=callback, **options
        )

    return run


def hessian_trace(folder: Path, mesh: Any, callback: Callable[[Any], None]) -> Any:
    space = None if mesh is None else hf.sharded(problem()[1], mesh)
    return hf.hessian_trace(
        *problem(),
        max_matvecs=40,
        block_size=4,
        seed=0,
        mesh=mesh,
        space=space,
        checkpoint=folder,
        callback=callback,
    )


def implicit_gradient(folder: Path, mesh: Any, callback: Callable[[Any], None]) -> Any:
    loss, params, batches = problem()

    def inner(params: Any, log_decay: Tensor, batch: Any) -> Tensor:
        return loss(params, batch) + log_decay.exp() * hf.inner(params, params)

    def outer(params: Any, _: Tensor, batch: Any) -> Tensor:
        return loss(params, batch)

    return hf.implicit_gradient(
        outer,
        inner,
        params,
        torch.zeros((), dtype=torch.float64),
        outer_batches=batches,
        inner_batches=batches,
        rtol=1e-8,
        # The random parameters are no minimum of the inner loss.
        stationarity=1e9,
        checkpoint=folder,
        callback=callback,
    )


def training(folder: Path, mesh: None, callback: Callable[[Any], None]) -> dict[str, Any]:
    """Train by the command, and return the weights and the losses."""
    sizes = ("--examples", "300", "--batch-size", "20", "--epochs", "3", "--save-every", "2")
    command("train", *sizes, "--out", folder)
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["state_dict"]
    records = json.loads((folder / "history.json").read_text())["runs"][0]["records"]
    return {**weights, "loss": torch.tensor([record["loss"] for record in records])}


def analysis(folder: Path, mesh: None, callback: Callable[[Any], None]) -> dict[str, Any]:
    """Analyse the digits by the command, and return the arrays of all results."""
    sizes = (
        "--examples",
        "200",
        "--k",
        "2",
        "--steps",
        "10",
        "--probes",
        "2",
        "--seed",
        "0",
        "--only",
        "eigenvalues,trace,density",
    )
    command("analyze", "digits", *sizes, "--checkpoint", folder / "state", "--out", folder / "out")
    found = {}
    for file in sorted((folder / "out").glob("*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            of_file = {f"{file.stem} {n}": arrays[n] for n in arrays.files if n[0] != "_"}
        found |= {n: torch.from_numpy(a) for n, a in of_file.items() if a.dtype.kind in "fi"}
    return found


def tracking(folder: Path, mesh: None, callback: Callable[[Any], None]) -> dict[str, Any]:
    """Append the points of a training to a file, and return all of them."""
    loss, params, batches = problem()
    file = folder.with_suffix(".jsonl")
    write = json_lines(file)
    first = len(read(file))
    for step in range(100):
        gradient = torch.func.grad(loss)(params, batches[0])
        if step >= first:
            write(Point(step=step, loss=float(loss(params, batches[0]))))
            callback(None)
        params = {name: p - 0.1 * gradient[name] for name, p in params.items()}
    points = read(file)
    return {
        "step": torch.tensor([point.step for point in points]),
        "loss": torch.tensor([point.loss for point in points]),
    }


def command(*words: object) -> None:
    from hessfunc.app.cli import app

    with redirect_stdout(io.StringIO()):
        app(list(map(str, words)), standalone_mode=False)


RUNS: dict[str, Run] = {
    "lanczos": algorithm("lanczos", k=4, basis_size=12, rtol=1e-9, seed=0),
    "block lanczos": algorithm("lanczos", k=3, block_size=2, which="LA", rtol=1e-8, seed=0),
    "power_iteration": algorithm("power_iteration", k=1, rtol=1e-4, seed=0),
    "hutchinson": algorithm("hutchinson", max_matvecs=40, block_size=4, seed=0),
    "trace": algorithm("trace", max_matvecs=30, seed=0),
    "hutchpp": algorithm("hutchpp", max_matvecs=30, block_size=5, seed=0),
    "xtrace": algorithm("xtrace", max_matvecs=30, block_size=5, seed=0),
    "xnystrace": algorithm("xnystrace", hf.ggnvp, max_matvecs=20, block_size=5, seed=0),
    "diagonal": algorithm("diagonal", max_matvecs=30, seed=0),
    "hutchinson_diagonal": algorithm("hutchinson_diagonal", max_matvecs=40, block_size=4, seed=0),
    "xdiag": algorithm("xdiag", max_matvecs=30, block_size=5, seed=0),
    "slq": algorithm("slq", probes=3, steps=12, seed=0),
    "logdet": algorithm("logdet", damping=5.0, max_matvecs=30, seed=0),
    "function": algorithm("function", rtol=1e-6, basis_size=8),
    "cg": algorithm("cg", damping=1.0, rtol=1e-10),
    "minres": algorithm("minres", damping=1.0, rtol=1e-10),
    "hessian_trace": hessian_trace,
}
# Runs of a single process.
ALONE: dict[str, Run] = {
    "implicit_gradient": implicit_gradient,
    "hessfunc train": training,
    "hessfunc analyze": analysis,
    "points": tracking,
}


def numbers(result: Any) -> dict[str, Any]:
    """Return the tensors and numbers of a result, without vectors, which ranks hold in parts."""
    if isinstance(result, dict):
        return result
    found = {field.name: getattr(result, field.name) for field in fields(result)}
    kept = (Tensor, float, int)
    return {name: v for name, v in found.items() if isinstance(v, kept) and name != "vectors"}


@dataclass(frozen=True)
class Fatal:
    """Kill of a process: its rank, the round (0: the start), and the delay in seconds."""

    rank: int
    round: int
    delay: float


def work(folder: Path, run: Run, rank: int, size: int, fatal: Fatal | None) -> None:
    """Run in this process, which may kill itself, and save the result of the first rank."""
    torch.set_num_threads(1)
    mesh = None
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("data",))
    rounds = -1

    def callback(_: Any) -> None:
        nonlocal rounds
        rounds += 1
        if fatal is not None and (rank, rounds) == (fatal.rank, fatal.round):
            kill = threading.Timer(fatal.delay, os.kill, (os.getpid(), signal.SIGKILL))
            kill.daemon = True
            kill.start()

    callback(None)
    result = run(folder / "state", mesh, callback)
    if rank == 0:
        torch.save({"numbers": numbers(result), "rounds": rounds}, folder / "part.pt")
        (folder / "part.pt").rename(folder / "found.pt")


def forked(folder: Path, run: Run, rank: int, size: int, fatal: Fatal | None) -> int:
    """Start a process that works, and return its number."""
    child = os.fork()
    if child:
        return child
    errors, status = (folder / f"errors{rank}").open("w"), 1
    try:
        os.dup2(errors.fileno(), 2)
        faulthandler.enable(errors)
        work(folder, run, rank, size, fatal)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=errors, flush=True)
    finally:
        os._exit(status)


def attempt(folder: Path, run: Run, size: int, fatal: Fatal | None) -> bool:
    """Run on this number of ranks, and return whether the fatal moment came.

    Raises:
        RuntimeError: If a rank that was not killed fails otherwise than by the loss of contact.
    """
    (folder / "store").unlink(missing_ok=True)
    started = time.monotonic()
    children = [forked(folder, run, rank, size, fatal) for rank in range(size)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    killed = fatal is not None and statuses[fatal.rank] == -signal.SIGKILL
    for rank, status in enumerate(statuses):
        text = (folder / f"errors{rank}").read_text()
        is_victim = fatal is not None and killed and rank == fatal.rank
        # The other ranks may have finished before.
        fine = is_victim or status == 0 or (killed and status == 1 and _LOST in text)
        if not fine:
            raise RuntimeError(f"rank {rank} of {size}, {fatal}: status {status}: {text}")
    if killed and time.monotonic() - started > TIMEOUT:
        raise RuntimeError(f"{fatal} on {size} ranks: the others waited for the timeout")
    return killed


def refuse_other(found: dict[str, Any], expected: dict[str, Any], *, exact: bool) -> None:
    """Raise if the numbers of a result are not those of the uninterrupted run."""
    for name, value in expected.items():
        mine, theirs = torch.as_tensor(found[name]), torch.as_tensor(value)
        if exact:
            same = torch.equal(mine, theirs)
        elif name in ("matvecs", "passes", "reorthogonalisations"):
            same = True
        else:
            same = torch.allclose(mine.double(), theirs.double(), rtol=1e-6, atol=1e-8)
        if not same:
            raise RuntimeError(f"{name} is {mine}, not {theirs}")


def trial(run: Run, expected: dict[str, Any], ranks: int, chance: random.Random) -> int:
    """Kill a run at random moments until an attempt survives; return the number of kills."""
    kills = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        while not (folder / "found.pt").exists():
            size = chance.randint(1, ranks)
            moment = chance.randint(0, expected["rounds"])
            longest = DELAY if moment else expected["seconds"]
            delay = chance.choice([0.0, chance.uniform(0, longest)])
            fatal = Fatal(chance.randrange(size), moment, delay)
            kills += attempt(folder, run, size, fatal if kills < 3 else None)
        found = torch.load(folder / "found.pt", weights_only=False)
    refuse_other(found["numbers"], expected["numbers"], exact=ranks == 1)
    return kills


def uninterrupted(run: Run) -> dict[str, Any]:
    """Run in this process, and import what the forks need."""
    import torch._dynamo
    import torch.distributed.tensor

    with tempfile.TemporaryDirectory() as made:
        work(Path(made), run, 0, 1, None)
        found: dict[str, Any] = torch.load(Path(made, "found.pt"), weights_only=False)
    with tempfile.TemporaryDirectory() as made:
        started = time.monotonic()
        attempt(Path(made), run, 1, None)
        return found | {"seconds": time.monotonic() - started}


def main(*, kills: int = 50, ranks: int = 1, seed: int = 0) -> Counter[str]:
    """Return the number of kills by run."""
    chance, done = random.Random(seed), Counter[str]()
    runs = RUNS if ranks > 1 else RUNS | ALONE
    expected: dict[str, dict[str, Any]] = {}
    while done.total() < kills:
        name = chance.choice(list(runs))
        if name not in expected:
            expected[name] = uninterrupted(runs[name])
        done[name] += trial(runs[name], expected[name], ranks, chance)
        print(f"{done.total():4} kills, {name}", flush=True)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="Number of kills.")
    parser.add_argument("--ranks", type=int, default=1, help="Largest number of ranks.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments.")
    main(**vars(parser.parse_args()))
