"""Command ``hessfunc plan``, which estimates memory, communication and time of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from hessfunc.app.cli.options import Traceback, fail, in_one_line, unless_given
from hessfunc.app.cli.planned import GIB, judged, shown
from hessfunc.app.plan import (
    BYTES,
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
        typer.Option(min=1, metavar="N", help="Number of parameters of the network, such as 7e9."),
    ],
    algorithm: Annotated[
        str, typer.Option(metavar="NAME", help="Algorithm: lanczos, slq, hutchinson or xtrace.")
    ] = "lanczos",
    k: Annotated[int, typer.Option(min=1, metavar="N", help="lanczos: number of eigenpairs.")] = 10,
    steps: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="lanczos: number of products; slq: steps per probe."),
    ] = 100,
    probes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Number of random vectors.", "slq 1, hutchinson 100, xtrace 50"),
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Vectors per block product.", "lanczos 1, traces 10"),
        ),
    ] = None,
    basis_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("lanczos: maximum number of basis vectors.", "2 k + 10"),
        ),
    ] = None,
    basis_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given(
                "lanczos: dtype of the basis, bfloat16, float32 or float64.", "float32"
            ),
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Dtype of the parameters and the graph.", rich_help_panel=_NETWORK
        ),
    ] = "float32",
    largest: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Entries of the largest parameter tensor.", "that of a transformer"),
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    graph_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="GiB",
            help=unless_given(
                "Memory of the activations of one batch, at the peak of a product.",
                "extrapolated from measured transformers",
            ),
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    batch_tokens: Annotated[
        float,
        typer.Option(
            min=1, metavar="N", help="Tokens per batch and rank.", rich_help_panel=_NETWORK
        ),
    ] = 2048,
    sequence: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Tokens per sequence.", rich_help_panel=_NETWORK),
    ] = 2048,
    vocabulary: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Size of the vocabulary.", rich_help_panel=_NETWORK),
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
        typer.Option(
            min=1, metavar="N", help="Number of ranks, one GPU each.", rich_help_panel=_RANKS
        ),
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
        typer.Option(
            min=0,
            metavar="GiB",
            help=unless_given("Memory per rank.", "not compared"),
            rich_help_panel=_RANKS,
        ),
    ] = None,
    reserve: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="GiB",
            help="Part of --gpu-memory for CUDA, NCCL and allocator fragmentation.",
            rich_help_panel=_RANKS,
        ),
    ] = 3.0,
    gradient_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given(
                "Time of one gradient over the data of one rank.",
                "6 params tokens / (ranks teraflops utilisation)",
            ),
            rich_help_panel=_TIME,
        ),
    ] = None,
    tokens: Annotated[
        float,
        typer.Option(
            min=1, metavar="N", help="Tokens of all batches on all ranks.", rich_help_panel=_TIME
        ),
    ] = 2**20,
    teraflops: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given("Peak teraflops per rank.", "67; 989 in bfloat16, float16"),
            rich_help_panel=_TIME,
        ),
    ] = None,
    utilisation: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help="Share of --teraflops that is reached.",
            rich_help_panel=_TIME,
        ),
    ] = 0.4,
    memory_bandwidth: Annotated[
        float,
        typer.Option(
            min=0, metavar="GiB/s", help="Memory bandwidth of a GPU.", rich_help_panel=_TIME
        ),
    ] = 2000.0,
    network_bandwidth: Annotated[
        float,
        typer.Option(
            min=0, metavar="GiB/s", help="Bandwidth at which a rank sends.", rich_help_panel=_TIME
        ),
    ] = 20.0,
    latency: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="us",
            help="Latency of a collective, in microseconds.",
            rich_help_panel=_TIME,
        ),
    ] = 50.0,
    traceback: Traceback = False,
) -> None:
    """Estimate memory per rank, communication and time of a run.

    Nothing is loaded or downloaded. By default the network is a causal transformer of the usual
    shape in float32, and the GPU is an H100. A GiB is 2^30 bytes, also in bandwidths. The command
    prints every number that the plan depends on, and whether it was given, assumed or measured.

    The parameters are replicated. Each rank computes Hessian products in reverse mode, one vector
    at a time, and rebuilds the graph of each batch in each pass.
    """

    def given(option: str, otherwise: str = "assumed") -> str:
        source = context.get_parameter_source(option)
        return "given" if source is not None and source.name == "COMMANDLINE" else otherwise

    try:
        if dtype not in BYTES:
            raise ValueError(f"--dtype must be one of {', '.join(BYTES)}, not {dtype!r}")
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
        console.print(part)


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
