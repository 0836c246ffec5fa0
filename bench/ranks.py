"""How well ranks share work: ``torchrun --standalone --nproc-per-node 2 -m bench.ranks``.

In every round the first rank does all of the work while the others wait, and then all ranks do it
together. So each efficiency is a ratio within a round, on the machine as it is at that moment.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hessfunc as hf
from bench.markdown import table
from bench.speed.cells import about
from bench.speed.models import Case, batches_of, made
from hessfunc.app.launched import launched

RESULTS = Path(__file__).parent / "results" / "ranks.md"
ROUNDS = 5
BATCHES = 8
_STEPS = 20


@dataclass(frozen=True)
class Work:
    """Something that one process can do, or all of them.

    Attributes:
        title: for the table.
        alone: the work, by one.
        together: the same work, called on every rank.
    """

    title: str
    alone: Callable[[], object]
    together: Callable[[], object]


def products(case: Case, axis: str, k: int, batches: int) -> Work:
    """A block of the Hessian of several batches, divided along one axis."""
    model_fn, params = hf.functional(case.model)
    curvature = hf.hvp(hf.supervised(model_fn, case.criterion))
    data = batches_of(case, batches)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
    block = hf.random_like(params, k, seed=0)
    alone = hf.over_batches(curvature)(params, data)
    together = hf.over_batches(curvature, mesh=mesh)(params, data)
    title = f"{_name(case)}: batches: {batches}, block of {k}, divided by {axis}"
    return Work(title, lambda: alone(block), lambda: together(block))


def density(case: Case, mesh: DeviceMesh) -> Work:
    """Lanczos steps with a basis that is cut over ranks, and the batches divided."""
    model_fn, params = hf.functional(case.model)
    curvature = hf.hvp(hf.supervised(model_fn, case.criterion))
    data = batches_of(case, BATCHES)
    one = hf.over_batches(curvature)(params, data)
    all_of_them = hf.over_batches(curvature, mesh=mesh)(params, data)
    space = hf.sharded(params, mesh)

    def together() -> object:
        return hf.slq(all_of_them, params, probes=2, steps=_STEPS, seed=0, space=space)

    return Work(
        f"{_name(case)}: density, {_STEPS} steps x 2 probes, basis cut over ranks",
        lambda: hf.slq(one, params, probes=2, steps=_STEPS, seed=0),
        together,
    )


def _name(case: Case) -> str:
    return f"{case.title.rpartition(',')[0]}, {len(case.inputs)} examples"


@dataclass(frozen=True)
class Efficiency:
    """Of each round, on the first rank.

    Attributes:
        shared: ``T_1 / (R T_R)``, the work divided among R ranks.
        apart: ``T_1 / T'_R``, where each of R ranks does all of the work for itself: what one
            process loses where others run beside it.
    """

    shared: list[float]
    apart: list[float]


def efficiency(work: Work) -> Efficiency:
    """Rounds of one process, of all side by side, and of all together."""
    found = Efficiency([], [])
    for turn in range(ROUNDS + 1):
        alone = _seconds(work.alone) if dist.get_rank() == 0 else 0.0
        dist.barrier()
        apart = _seconds(work.alone)
        dist.barrier()
        together = _seconds(work.together)
        dist.barrier()
        # The first round has warmed up all.
        if turn:
            found.shared.append(alone / (dist.get_world_size() * together))
            found.apart.append(alone / apart)
    return found


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def markdown(rows: Sequence[tuple[str, Efficiency]]) -> str:
    """The page of these efficiencies."""
    facts = ", ".join(f"{name}: {value}" for name, value in about([]).items())
    ranks = dist.get_world_size()
    head = ["work", f"efficiency of {ranks} ranks", f"{ranks} processes side by side", "of these"]
    body = [
        [
            title,
            _spread(found.shared),
            _spread(found.apart),
            f"{statistics.median(map(truediv, found.shared, found.apart)):.2f}",
        ]
        for title, found in rows
    ]
    return (
        f"# How well ranks share work\n\n{facts}\n\n"
        "**Efficiency**: the time of one process over R times that of R processes, for the same "
        "work (strong scaling), one thread each, by gloo on one machine. One process leaves the "
        "other core free. **Side by side**: the time of a process that is alone over that of the "
        "same process while R - 1 others do the same, each for itself, without a word: what cores "
        "take from each other, memory and clock. **Of these**: the first over the second, what "
        f"sharing itself costs. Medians of {ROUNDS} rounds, with quartiles.\n\n"
        f"{table([head, *body])}\n"
    )


def _spread(found: Sequence[float]) -> str:
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    with launched(torch.device("cpu")) as mesh:
        works = [
            products(made("resnet20", 64), "data", 2, 4),
            products(made("resnet20", 64), "probe", 8, 1),
            products(made("gpt", 16), "data", 4, BATCHES),
            products(made("gpt", 16), "probe", 16, 2),
            products(made("gpt", 16), "probe", 16, 1),
            density(made("gpt", 16), mesh),
        ]
        rows = []
        for work in works:
            rows.append((work.title, efficiency(work)))
            if dist.get_rank() == 0:
                print(
                    work.title, _spread(rows[-1][1].shared), _spread(rows[-1][1].apart), flush=True
                )
        if dist.get_rank() == 0:
            RESULTS.write_text(markdown(rows))
            print(RESULTS)


if __name__ == "__main__":
    main()
