"""Command ``hessfunc plan``, which estimates memory, communication and time of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hessfunc.app.cli.errors import fail, given
from hessfunc.app.cli.planned import GIB, Number, as_data, judged, shown
from hessfunc.app.plan import (
    Algorithm,
    Hutchinson,
    Lanczos,
    Machine,
    PowerIteration,
    Setting,
    Slq,
    Transformer,
    Xtrace,
)
from hessfunc.app.plan import gradient_seconds as of_gradient
from hessfunc.app.terminal import Output

if TYPE_CHECKING:
    from hessfunc.app.problems.huggingface import Sizes

# Peak teraflops of an H100 by dtype. float32 is without TF32, which products do not use.
_TERAFLOPS = {"float64": 67.0, "float32": 67.0, "bfloat16": 989.0, "float16": 989.0}
_VOCABULARY, _SEQUENCE = 32_000, 2048


def plan(
    context: typer.Context,
    target: str | None = None,
    params: int | None = None,
    algorithm: str = "lanczos",
    k: int = 10,
    steps: int = 100,
    probes: int | None = None,
    block_size: int | None = None,
    basis_size: int | None = None,
    basis_dtype: str | None = None,
    dtype: str = "float32",
    trainable: int | None = None,
    largest: int | None = None,
    graph_memory: float | None = None,
    batch_tokens: int = 2048,
    sequence: int | None = None,
    vocabulary: int | None = None,
    recompute: bool = False,
    ranks: int = 1,
    unsharded: bool = False,
    gpu_memory: float | None = None,
    reserve: float = 3.0,
    gradient_seconds: float | None = None,
    tokens: int = 2**20,
    teraflops: float | None = None,
    utilisation: float = 0.4,
    memory_bandwidth: float = 2000.0,
    network_bandwidth: float = 20.0,
    latency: float = 50.0,
) -> Output:
    """Estimate memory per rank, communication and time of a run.

    Nothing is downloaded, and of hf:PATH only the config is read. Without hf:PATH, the network is a
    causal transformer of the usual shape in float32. By default the GPU is an H100. A GiB is 2^30
    bytes, also in bandwidths. The command prints every number that the plan depends on, and whether
    it was given, assumed or measured. The exit code is 1 if the run does not fit in --gpu-memory.

    The parameters are replicated, unless a change divides them. Each rank computes Hessian products
    in reverse mode, one vector at a time, and rebuilds the graph of each batch in each pass.
    """

    from_command_line = given(context)

    def source(name: str, otherwise: str = "assumed") -> str:
        return "given" if name in from_command_line else otherwise

    read = _read(target, params, vocabulary)
    shape = (
        Transformer.usual(params or 1, vocabulary or _VOCABULARY) if read is None else read.shape
    )
    sequence = sequence or min(_SEQUENCE, _SEQUENCE if read is None else read.context)
    network = shape.network(dtype, tokens=batch_tokens, context=min(sequence, batch_tokens))
    if recompute:
        network = network.computed_again()
    if graph_memory is not None:
        network = replace(network, activations=round(graph_memory * GIB), recomputed=None)
    if largest is None and read is not None:
        largest = read.largest
    if largest is not None:
        network = replace(network, largest=largest)
    if trainable is not None:
        network = network.with_trainable(trainable)
    setting = Setting(network, ranks, not unsharded)
    chosen = _algorithm(algorithm, k, steps, probes, block_size, basis_size, basis_dtype)
    rate = _TERAFLOPS[dtype] if teraflops is None else teraflops
    if gradient_seconds is None:
        reached = 1e12 * rate * utilisation
        gradient_seconds = of_gradient(shape.params, tokens / ranks, reached)
    machine = Machine(
        gradient_seconds=gradient_seconds,
        memory_bandwidth=memory_bandwidth * GIB,
        network_bandwidth=network_bandwidth * GIB,
        latency=1e-6 * latency,
        batches=tokens / (ranks * batch_tokens),
        product_gradients=3.0 if recompute else 2.0,
    )
    room = None if gpu_memory is None else max(0, round((gpu_memory - reserve) * GIB))
    verdict = judged(setting, chosen, room)

    config = "assumed: width = 100 layers" if read is None else "read from the config"
    limit = "assumed" if read is None else "assumed, up to the context of the config"
    numbers: list[Number] = [
        ("parameters", f"{shape.params:,} in {dtype}", source("params", config)),
        ("trainable parameters", f"{network.params:,}", source("trainable", "all")),
        ("layers, width", f"{shape.layers}, {shape.width:,}", config),
        ("largest parameter", f"{network.largest:,}", source("largest", config)),
        ("tokens per batch", f"{batch_tokens:,}", source("batch_tokens")),
        ("tokens per sequence", f"{sequence:,}", source("sequence", limit)),
        ("vocabulary", f"{shape.vocabulary:,}", source("vocabulary", config)),
        (
            "activations per batch",
            f"{network.activations / GIB:.2f} GiB",
            source("graph_memory", "measured on GPTs to 3.4M"),
        ),
        ("reserved memory", f"{reserve:g} GiB", source("reserve")),
        ("tokens in all batches", f"{tokens:,}", source("tokens")),
        ("peak of a rank", f"{rate:g} teraflops", source("teraflops", "assumed: H100, no TF32")),
        ("utilisation", f"{utilisation:.0%}", source("utilisation")),
        (
            "time of a gradient",
            f"{gradient_seconds:.3g} s",
            source("gradient_seconds", "6 flops per parameter and token"),
        ),
        (
            "cost of graph, product",
            f"{machine.graph_gradients:g}, {machine.product_gradients:g} gradients",
            "counted in operations",
        ),
        ("memory bandwidth", f"{memory_bandwidth:g} GiB/s", source("memory_bandwidth")),
        ("network bandwidth", f"{network_bandwidth:g} GiB/s", source("network_bandwidth")),
        ("latency", f"{latency:g} us", source("latency")),
    ]
    parts = shown(verdict, machine, numbers)
    data = as_data(verdict, machine, numbers)
    return Output(parts, data, code=0 if verdict.fits else 1)


def _read(target: str | None, params: int | None, vocabulary: int | None) -> Sizes | None:
    """Return the sizes of the model of a target; None without a target."""
    if target is None:
        if params is None:
            fail("pass the number of parameters, such as --params 7B, or a target hf:PATH")
        return None
    kind, _, path = target.partition(":")
    if kind != "hf" or not path:
        fail(f"TARGET must be hf:PATH, not {target!r}")
    if params is not None or vocabulary is not None:
        fail("--params and --vocabulary are read from hf:PATH: omit them")
    from hessfunc.app.problems.huggingface import sizes

    return sizes(Path(path))


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
        case "power":
            return PowerIteration(k, steps)
        case "slq":
            return Slq(probes or 1, steps)
        case "hutchinson":
            return Hutchinson(probes or 100, block_size or 10)
        case _:
            return Xtrace(probes or 50, block_size or 10)
