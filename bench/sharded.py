"""Memory, traffic and work of products of a sharded model, beside those of the whole model.

    torchrun --standalone --nproc-per-node 2 -m bench.sharded

The tensors of a rank are counted exactly by `Footprint`, from the parameters to the product. The
first rank measures the whole model while the others wait. Results are printed, and written to
bench/results/sharded.md.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import hessfunc as hf
from bench.markdown import table
from hessfunc import ranks as ranks_module
from hessfunc.app.launched import launched
from hessfunc.app.problems.gpt import GPT
from hessfunc.memory import Footprint
from hessfunc.trees import leaves

RESULTS = Path(__file__).parent / "results" / "sharded.md"
MIB = 2**20
LAYERS, WIDTH, VOCABULARY, TOKENS, SEQUENCES = 8, 512, 256, 32, 4
# Of the narrower model whose work is measured, because it grows with the width squared.
NARROW, OF_SEQUENCES = 256, (4, 16, 64)
ROUNDS = 3
CURVATURES: dict[str, Callable[[hf.Loss], Any]] = {
    "Hessian, reverse": hf.hvp,
    "Hessian, forward": partial(hf.hvp, mode="forward"),
    "Gauss-Newton": hf.ggnvp,
}
WAYS = ("whole", "whole, recomputed", "sharded")


@dataclass(frozen=True)
class Taken:
    """Memory and traffic of one rank.

    Attributes:
        held: Bytes between products: parameters, their copy and the kept graph.
        peak: Bytes at the peak, which includes the vector and its product.
        sent: Bytes that a product exchanges with other ranks.
    """

    held: int
    peak: int
    sent: int


def model(width: int = WIDTH) -> GPT:
    torch.manual_seed(0)
    return GPT(VOCABULARY, TOKENS, width, LAYERS, heads=8)


def functional(way: str, mesh: DeviceMesh, width: int) -> tuple[Any, dict[str, Tensor]]:
    if way == "sharded":
        return hf.functional(model(width), mesh=mesh)
    return hf.functional(model(width), recompute=None if way == "whole" else "layers.*")


def matvec_of(
    way: str, curvature: str, mesh: DeviceMesh, width: int = WIDTH, sequences: int = SEQUENCES
) -> tuple[Any, dict[str, Tensor]]:
    """The product with the loss of one batch, and the parameters."""
    model_fn, params = functional(way, mesh, width)
    loss = hf.composed(
        lambda p, pair: model_fn(p, pair[0]).flatten(0, 1),
        torch.nn.functional.cross_entropy,
        targets=lambda pair: pair[1].flatten(),
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (sequences, TOKENS + 1), generator=generator)
    batch = tokens[:, :-1], tokens[:, 1:]
    gc.collect()
    return CURVATURES[curvature](loss)(params, batch), params


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """Count the bytes that this rank exchanges in gathers and reduce-scatters."""
    names = "_all_gather", "_reduce_scatter"
    plain = [getattr(ranks_module, name) for name in names]

    def counting(collective: Callable[..., None], larger: int) -> Callable[..., None]:
        def call(*tensors: Tensor, **options: Any) -> None:
            size = dist.get_world_size(options["group"])
            sent.append(tensors[larger].nbytes * (size - 1) // size)
            collective(*tensors, **options)

        return call

    for name, collective, larger in zip(names, plain, (0, 1), strict=True):
        setattr(ranks_module, name, counting(collective, larger))
    try:
        yield
    finally:
        for name, collective in zip(names, plain, strict=True):
            setattr(ranks_module, name, collective)


def taken(way: str, curvature: str, mesh: DeviceMesh) -> Taken:
    """Measure one product after another has been made."""
    sent: list[int] = []
    with Footprint() as memory:
        matvec, params = matvec_of(way, curvature, mesh)
        block = hf.random_like(params, 1, seed=0)
        matvec(block)
        gc.collect()
        held, memory.peak = memory.now - sum(map(own_bytes, leaves(block))), memory.now
        with counted(sent):
            matvec(block)
    return Taken(held, memory.peak, sum(sent))


def own_bytes(leaf: Any) -> int:
    return int(leaf.to_local().nbytes if hasattr(leaf, "to_local") else leaf.nbytes)


def efficiency(sequences: int, mesh: DeviceMesh) -> list[float]:
    """Processor time of one process over that of all ranks together, in turns."""
    of = "Hessian, reverse", mesh, NARROW, sequences
    alone, params = matvec_of("whole, recomputed", *of)
    together, shards = matvec_of("sharded", *of)
    block, shards_of_block = hf.random_like(params, 1, seed=0), hf.random_like(shards, 1, seed=0)
    ratios: list[float] = []
    for turn in range(ROUNDS + 1):
        one = seconds(lambda: alone(block)) if dist.get_rank() == 0 else 0.0
        dist.barrier()
        every = torch.tensor([one, seconds(lambda: together(shards_of_block))])
        dist.all_reduce(every)
        # The first turn warms up.
        if turn:
            ratios.append(float(every[0] / every[1]))
    return ratios


def seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    with launched(torch.device("cpu")) as mesh:
        ranks, first = dist.get_world_size(), dist.get_rank() == 0
        whole = sum(p.nbytes for p in model().parameters())
        block = sum(p.nbytes for p in model().layers[0].parameters())
        unit = whole * (ranks - 1) / ranks
        rows = [["product", "model", "held MiB", "peak MiB", "peak / whole", "wire / N"]]
        for curvature in CURVATURES:
            base = 0
            for way in WAYS:
                if way == "sharded" or first:
                    one = taken(way, curvature, mesh)
                dist.barrier()
                if first:
                    base = base or one.peak
                    wire = f"{one.sent / unit:.2f}" if one.sent else ""
                    sizes = [f"{x / MIB:.0f}" for x in (one.held, one.peak)]
                    rows.append([curvature, way, *sizes, f"{one.peak / base:.2f}", wire])
                    print(rows[-1], flush=True)
        works = [["tokens on a rank", "work of one process / work of all ranks"]]
        for sequences in OF_SEQUENCES:
            low, median, high = statistics.quantiles(efficiency(sequences, mesh), n=4)
            tokens = f"{sequences * TOKENS // ranks}"
            works.append([tokens, f"{median:.2f} ({low:.2f}-{high:.2f})"])
        if first:
            RESULTS.write_text(page(rows, works, ranks, whole, block))
            print(RESULTS.read_text())


def page(rows: list[list[str]], works: list[list[str]], ranks: int, whole: int, block: int) -> str:
    """The page of these rows."""
    return (
        f"# Products of a sharded model\n\nGPT of {LAYERS} layers of width {WIDTH} in float32, "
        f"{whole / MIB:.0f} MiB, of which a layer has {block / MIB:.0f}; one batch of {SEQUENCES} "
        f"sequences of {TOKENS} tokens; {ranks} ranks over gloo, one thread each, torch "
        f"{torch.__version__}.\n\n**held**: bytes of tensors between two products, on the first "
        "rank: parameters, their copy and the kept graph. **peak**: the same during a product, "
        "with the vector and the product. **wire**: bytes that a rank exchanges for a product, "
        f"in N = bytes of the model times (R - 1) / R.\n\n{table(rows)}\n\n"
        f"Width {NARROW}: processor time of a Hessian product of one process with the whole "
        "model, recomputed, over that of all ranks, which includes gloo's copies over the loopback "
        f"device; median and quartiles of {ROUNDS} turns.\n\n{table(works)}\n"
    )


if __name__ == "__main__":
    main()
