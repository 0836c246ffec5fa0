"""The memory that was planned beside the memory that was taken, on several sizes and ranks.

    python -m bench.planned

Each rank is a process of its own that runs an algorithm with `sharded` vectors and batches that
are divided over gloo, and does nothing else. The tensors of a rank are counted exactly by
`Footprint`; its resident memory has in addition what kernels take for themselves. Of both the
rank counts that takes the most. Results are written to bench/results/planned.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import cross_entropy

import hessfunc as hf
from bench import resident
from bench.markdown import table
from hessfunc.app.plan import (
    Algorithm,
    Hutchinson,
    Lanczos,
    Machine,
    Network,
    Plan,
    PowerIteration,
    Setting,
    Slq,
    plan,
)
from hessfunc.app.problems.nets import mlp
from hessfunc.memory import Footprint

RESULTS = Path(__file__).parent / "results" / "planned.md"
WIDTHS = (360, 680, 1380)
RANKS = (1, 2, 4)
ALGORITHMS: dict[str, Algorithm] = {
    "lanczos": Lanczos(k=4, steps=40, basis_size=18),
    "slq": Slq(probes=2, steps=15),
    "hutchinson": Hutchinson(probes=10),
    "power": PowerIteration(k=2, steps=20),
    "divided": Lanczos(k=4, steps=40, basis_size=18),
    "frozen": Lanczos(k=4, steps=40, basis_size=18),
}
# Parameters that are divided among ranks, and a net whose first layers are frozen.
_DIVIDED, _FROZEN = "divided", "frozen"
BATCHES, EXAMPLES = 4, 8
MIB = 2**20
# Tensors are returned to the system when they are freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# A loose tolerance, so that pairs converge and all of the run is seen.
_RTOL = 0.1
_MINUTES = 5


@dataclass(frozen=True)
class Taken:
    """What one rank took.

    Attributes:
        counted: bytes of all tensors at once, the parameters included.
        resident: bytes above what the process had before.
        activations: bytes of the graph of one batch, without the gradient.
        rates: of this rank, as measured.
        seconds: of the run.
        products: of the run.
    """

    counted: int
    resident: int
    activations: int
    rates: Machine
    seconds: float
    products: int


@dataclass(frozen=True)
class Compared:
    """A plan beside what the rank took that took the most.

    Attributes:
        algorithm: by name.
        plan: of the run.
        taken: by each rank.
    """

    algorithm: str
    plan: Plan
    taken: list[Taken]

    @property
    def counted(self) -> float:
        """The bytes that were planned over those of tensors."""
        return self.plan.peak.total / max(rank.counted for rank in self.taken)

    @property
    def resident(self) -> float:
        """The bytes that were planned over those of the process."""
        return self.plan.peak.total / max(rank.resident for rank in self.taken)

    @property
    def seconds(self) -> tuple[float, float]:
        """Of one product, as planned and as measured, on the slowest rank."""
        slowest = max(self.taken, key=lambda rank: rank.seconds)
        setting = self.plan.setting
        workload = self.plan.algorithm.workload(setting)
        whole = slowest.rates.in_all(setting, workload)
        return whole.seconds / workload.products, slowest.seconds / slowest.products


def net(width: int, algorithm: str = "") -> nn.Sequential:
    """A perceptron of three hidden layers, two of which may be frozen."""
    torch.manual_seed(0)
    model = mlp([64, width, width, width, 10], nn.Tanh)
    if algorithm == _FROZEN:
        model[:4].requires_grad_(False)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(EXAMPLES, 64, generator=generator),
            torch.randint(10, (EXAMPLES,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


def planned(width: int, ranks: int, algorithm: str, activations: int) -> Plan:
    """Of the run that `taken` measures."""
    model = net(width, algorithm)
    sizes = [leaf.numel() for leaf in model.parameters() if leaf.requires_grad]
    network = Network(
        sum(sizes),
        max(sizes),
        activations=activations,
        frozen=sum(leaf.numel() for leaf in model.parameters()) - sum(sizes),
        block=max(sum(leaf.numel() for leaf in layer.parameters()) for layer in model),
    )
    setting = Setting(network, ranks, divided=algorithm == _DIVIDED)
    return plan(setting, ALGORITHMS[algorithm])


def taken(width: int, algorithm: str) -> Taken:
    """What this rank takes, where torch.distributed has begun."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    # What a first run takes, such as modules that are imported then, is not counted.
    _run(8, algorithm, mesh)
    model_fn, params = hf.functional(net(width, algorithm))
    loss = hf.supervised(model_fn, cross_entropy)
    own = sum(leaf.numel() * leaf.itemsize for leaf in params.values())
    data = batches()
    with Footprint() as graph:
        kept = hf.hvp(loss)(params, data[0])
    activations = graph.now - own
    del kept
    with Footprint() as memory:
        held = resident.peak_above(lambda: _run(width, algorithm, mesh))
    started = time.perf_counter()
    found = _run(width, algorithm, mesh)
    seconds = time.perf_counter() - started
    row = torch.ones(own // 4)
    small = torch.ones(1)
    waiting = _seconds(lambda: dist.all_reduce(small))
    adding = max(_seconds(lambda: dist.all_reduce(row)) - waiting, 1e-9)
    rates = Machine(
        gradient_seconds=BATCHES / ranks * _seconds(lambda: grad(loss)(params, data[0])),
        memory_bandwidth=own / _seconds(row.sum),
        network_bandwidth=max(2 * (ranks - 1) / ranks * own, 1) / adding,
        latency=waiting,
    )
    return Taken(memory.peak, held, activations, rates, seconds, found.matvecs)


def _run(width: int, algorithm: str, mesh: Any) -> Any:
    # The parameters are made here, so that they are counted.
    divided = {"mesh": mesh, "shard": "*"} if algorithm == _DIVIDED else {}
    model_fn, params = hf.functional(net(width, algorithm), **divided)
    loss = hf.supervised(model_fn, cross_entropy)
    curvature = hf.over_batches(hf.hvp(loss, chunk_size=1), mesh=None if divided else mesh)
    matvec = curvature(params, batches())
    space = None if divided else hf.sharded(params, mesh)
    match ALGORITHMS[algorithm]:
        case Lanczos(k=k, steps=steps, basis_size=size):
            return hf.lanczos(
                matvec,
                params,
                k=k,
                basis_size=size,
                rtol=_RTOL,
                max_matvecs=steps + 20,
                seed=0,
                space=space,
            )
        case PowerIteration(k=k, steps=steps):
            return hf.power_iteration(
                matvec, params, k=k, rtol=_RTOL, max_matvecs=steps, seed=0, space=space
            )
        case Slq(probes=probes, steps=steps):
            return hf.slq(matvec, params, probes=probes, steps=steps, seed=0, space=space)
        case Hutchinson(probes=probes):
            return hf.hutchinson(matvec, params, max_matvecs=probes, seed=0, space=space)
    raise ValueError(f"{algorithm} is not measured here")


def _seconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return median(found)


def compared(width: int, ranks: int, algorithm: str) -> Compared:
    """The plan, and the run in processes of its own.

    Raises:
        RuntimeError: a rank has ended with an error.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ALLOCATOR
    with tempfile.TemporaryDirectory() as folder:
        of = [sys.executable, "-m", "bench.planned", "--of", str(width), str(ranks), algorithm]
        processes = [
            subprocess.Popen(
                [*of, str(rank), f"{folder}/store"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        told = [process.communicate(timeout=60 * _MINUTES)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank of {ranks} failed with {algorithm} on the width {width}")
    found = [json.loads(text) for text in told]
    taken = [Taken(**one | {"rates": Machine(**one["rates"])}) for one in found]
    return Compared(algorithm, planned(width, ranks, algorithm, taken[0].activations), taken)


def _one_rank(width: int, ranks: int, algorithm: str, rank: int, store: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    # That eigenvalues are repeated is no matter here.
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    print(json.dumps(asdict(taken(width, algorithm))))
    dist.destroy_process_group()


def markdown(results: Sequence[Compared]) -> str:
    """The table of what was planned and what was measured."""
    head = [
        "",
        "parameters",
        "ranks",
        "planned, MiB",
        "tensors, MiB",
        "planned / tensors",
        "resident, MiB",
        "planned / resident",
        "ms a product, planned",
        "measured",
    ]
    rows = [head]
    for result in results:
        expected, measured = result.seconds
        rows.append(
            [
                result.algorithm,
                f"{result.plan.setting.network.params:,}",
                str(result.plan.setting.ranks),
                f"{result.plan.peak.total / MIB:.1f}",
                f"{max(rank.counted for rank in result.taken) / MIB:.1f}",
                f"{result.counted:.2f}",
                f"{max(rank.resident for rank in result.taken) / MIB:.1f}",
                f"{result.resident:.2f}",
                f"{1e3 * expected:.0f}",
                f"{1e3 * measured:.0f}",
            ]
        )
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        width, ranks, algorithm, rank, store = arguments.of
        _one_rank(int(width), int(ranks), algorithm, int(rank), store)
        return
    results: list[Compared] = []
    for algorithm in ALGORITHMS:
        for width in WIDTHS:
            for ranks in RANKS:
                results.append(compared(width, ranks, algorithm))
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(markdown(results) + "\n")
                print(markdown(results[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
