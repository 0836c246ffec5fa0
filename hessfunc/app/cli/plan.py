"""Command ``hessfunc plan``, which estimates memory, communication and time of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hessfunc.app.cli.options import (
    Traceback,
    count,
    dtype_name,
    fail,
    in_one_line,
    option,
    quantity,
)
from hessfunc.app.cli.planned import GIB, judged, shown
from hessfunc.app.cli.progress import print_table
from hessfunc.app.plan import (
    Algorithm,
    Hutchinson,
    Lanczos,
    Machine,
    Setting,
    Slq,
    Transformer,
    Xtrace,
)
from hessfunc.app.plan import gradient_seconds as of_gradient

# Peak teraflops of an H100 by dtype. float32 is without TF32, which products do not use.
_TERAFLOPS = {"float64": 67.0, "float32": 67.0, "bfloat16": 989.0, "float16": 989.0}
_NETWORK, _RANKS, _TIME = "The network and its batches", "The ranks", "The time"


def plan(
    context: typer.Context,
    params: Annotated[
        float,
        option(
            "N", "Number of parameters of the network, such as 7e9 or 7B.", min=1, parser=quantity
        ),
    ],
    algorithm: Annotated[
        str, option("NAME", "Algorithm: lanczos, slq, hutchinson or xtrace.")
    ] = "lanczos",
    k: Annotated[int, option("N", "lanczos: number of eigenpairs.", min=1)] = 10,
    steps: Annotated[
        int,
        option("N", "lanczos: number of products; slq: steps per probe.", min=1),
    ] = 100,
    probes: Annotated[
        int | None,
        option("N", "Number of random vectors.", default="slq 1, hutchinson 100, xtrace 50", min=1),
    ] = None,
    block_size: Annotated[
        int | None,
        option("N", "Vectors per block product.", default="lanczos 1, traces 10", min=1),
    ] = None,
    basis_size: Annotated[
        int | None,
        option("N", "lanczos: maximum number of basis vectors.", default="2 k + 60", min=1),
    ] = None,
    basis_dtype: Annotated[
        str | None,
        option(
            "NAME", "lanczos: dtype of the basis, bfloat16, float32 or float64.", default="float32"
        ),
    ] = None,
    dtype: Annotated[
        str,
        option("NAME", "Dtype of the parameters and the graph.", panel=_NETWORK, parser=dtype_name),
    ] = "float32",
    largest: Annotated[
        float | None,
        option(
            "N",
            "Entries of the largest parameter tensor.",
            default="that of a transformer",
            panel=_NETWORK,
            min=1,
            parser=quantity,
        ),
    ] = None,
    graph_memory: Annotated[
        float | None,
        option(
            "GiB",
            "Memory of the activations of one batch, at the peak of a product.",
            default="extrapolated from measured transformers",
            panel=_NETWORK,
            min=0,
        ),
    ] = None,
    batch_tokens: Annotated[
        float,
        option("N", "Tokens per batch and rank.", panel=_NETWORK, min=1, parser=quantity),
    ] = 2048,
    sequence: Annotated[
        int,
        option("N", "Tokens per sequence.", panel=_NETWORK, min=1, parser=count),
    ] = 2048,
    vocabulary: Annotated[
        int,
        option("N", "Size of the vocabulary.", panel=_NETWORK, min=1, parser=count),
    ] = 32_000,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            metavar="",
            help='Recompute the layers: hf.functional(model, recompute="layers.*").',
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    ranks: Annotated[
        int,
        option("N", "Number of ranks, one GPU each.", panel=_RANKS, min=1),
    ] = 1,
    unsharded: Annotated[
        bool,
        typer.Option(
            "--unsharded",
            metavar="",
            help="Replicate the vectors: no space=hf.sharded(params, mesh).",
            rich_help_panel=_RANKS,
        ),
    ] = False,
    gpu_memory: Annotated[
        float | None,
        option("GiB", "Memory per rank.", default="not compared", panel=_RANKS, min=0),
    ] = None,
    reserve: Annotated[
        float,
        option(
            "GiB",
            "Part of --gpu-memory for CUDA, NCCL and allocator fragmentation.",
            panel=_RANKS,
            min=0,
        ),
    ] = 3.0,
    gradient_seconds: Annotated[
        float | None,
        option(
            "X",
            "Time of one gradient over the data of one rank.",
            default="6 params tokens / (ranks teraflops utilisation)",
            panel=_TIME,
            min=0,
        ),
    ] = None,
    tokens: Annotated[
        float,
        option("N", "Tokens of all batches on all ranks.", panel=_TIME, min=1, parser=quantity),
    ] = 2**20,
    teraflops: Annotated[
        float | None,
        option(
            "X",
            "Peak teraflops per rank.",
            default="67; 989 in bfloat16, float16",
            panel=_TIME,
            min=0,
        ),
    ] = None,
    utilisation: Annotated[
        float,
        option("X", "Share of --teraflops that is reached.", panel=_TIME, min=0, max=1),
    ] = 0.4,
    memory_bandwidth: Annotated[
        float,
        option("GiB/s", "Memory bandwidth of a GPU.", panel=_TIME, min=0),
    ] = 2000.0,
    network_bandwidth: Annotated[
        float,
        option("GiB/s", "Bandwidth at which a rank sends.", panel=_TIME, min=0),
    ] = 20.0,
    latency: Annotated[
        float,
        option("us", "Latency of a collective, in microseconds.", panel=_TIME, min=0),
    ] = 50.0,
    traceback: Traceback = False,
) -> None:
    """Estimate memory per rank, communication and time of a run.

    Nothing is loaded or downloaded. By default the network is a causal transformer of the usual
    shape in float32, and the GPU is an H100. A GiB is 2^30 bytes, also in bandwidths. The command
    prints every number that the plan depends on, and whether it was given, assumed or measured. The
    exit code is 1 if the run does not fit in --gpu-memory.

    The parameters are replicated. Each rank computes Hessian products in reverse mode, one vector
    at a time, and rebuilds the graph of each batch in each pass.
    """

    def given(option: str, otherwise: str = "assumed") -> str:
        source = context.get_parameter_source(option)
        return "given" if source is not None and source.name == "COMMANDLINE" else otherwise

    try:
        shape = Transformer.usual(round(params), vocabulary)
        network = shape.network(
            dtype, tokens=round(batch_tokens), context=min(sequence, round(batch_tokens))
        )
        if recompute:
            network = network.computed_again()
        if graph_memory is not None:
            network = replace(network, activations=round(graph_memory * GIB), recomputed=None)
        if largest is not None:
            network = replace(network, largest=round(largest))
        setting = Setting(network, ranks, not unsharded)
        chosen = _algorithm(algorithm, k, steps, probes, block_size, basis_size, basis_dtype)
        rate = _TERAFLOPS[dtype] if teraflops is None else teraflops
        _above_zero(
            teraflops=rate,
            utilisation=utilisation,
            memory_bandwidth=memory_bandwidth,
            network_bandwidth=network_bandwidth,
        )
        if gradient_seconds is None:
            reached = 1e12 * rate * utilisation
            gradient_seconds = of_gradient(network.params, tokens / ranks, reached)
        machine = Machine(
            gradient_seconds=gradient_seconds,
            memory_bandwidth=memory_bandwidth * GIB,
            network_bandwidth=network_bandwidth * GIB,
            latency=1e-6 * latency,
            product_gradients=3.0 if recompute else 2.0,
        )
        room = None if gpu_memory is None else max(0, round((gpu_memory - reserve) * GIB))
        verdict = judged(setting, chosen, room)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error))

    a_transformer = "assumed: width = 100 layers"
    numbers = [
        ("parameters", f"{network.params:,} in {dtype}", given("params")),
        ("layers, width", f"{shape.layers}, {shape.width:,}", a_transformer),
        ("largest parameter", f"{network.largest:,}", given("largest", a_transformer)),
        ("tokens per batch", f"{batch_tokens:,.0f}", given("batch_tokens")),
        ("tokens per sequence", f"{sequence:,}", given("sequence")),
        ("vocabulary", f"{vocabulary:,}", given("vocabulary")),
        (
            "activations per batch",
            f"{network.activations / GIB:.2f} GiB",
            given("graph_memory", "measured on GPTs to 3.4M"),
        ),
        ("reserved memory", f"{reserve:g} GiB", given("reserve")),
        ("tokens in all batches", f"{tokens:,.0f}", given("tokens")),
        ("peak of a rank", f"{rate:g} teraflops", given("teraflops", "assumed: H100, no TF32")),
        ("utilisation", f"{utilisation:.0%}", given("utilisation")),
        (
            "time of a gradient",
            f"{gradient_seconds:.3g} s",
            given("gradient_seconds", "6 flops per parameter and token"),
        ),
        (
            "cost of graph, product",
            f"{machine.graph_gradients:g}, {machine.product_gradients:g} gradients",
            "counted in operations",
        ),
        ("memory bandwidth", f"{memory_bandwidth:g} GiB/s", given("memory_bandwidth")),
        ("network bandwidth", f"{network_bandwidth:g} GiB/s", given("network_bandwidth")),
        ("latency", f"{latency:g} us", given("latency")),
    ]
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    for part in shown(verdict, machine, numbers):
        if isinstance(part, Table):
            print_table(console, part)
        else:
            console.print(part)
    if not verdict.fits:
        raise typer.Exit(1)


def _above_zero(**rates: float) -> None:
    for name, rate in rates.items():
        if not rate > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {rate:g}")


def _algorithm(
    name: str,
    k: int,
    steps: int,
    probes: int | None,
    block_size: int | None,
    basis_size: int | None,
    basis_dtype: str | None,
) -> Algorithm:
    match name:
        case "lanczos":
            return Lanczos(k, steps, block_size or 1, basis_size, basis_dtype)
        case "slq":
            return Slq(probes or 1, steps)
        case "hutchinson":
            return Hutchinson(probes or 100, block_size or 10)
        case "xtrace":
            return Xtrace(probes or 50, block_size or 10)
    raise ValueError(f"--algorithm must be lanczos, slq, hutchinson or xtrace, not {name!r}")
