"""What Lanczos would take of large transformers: computed, and measured nowhere.

    python -m bench.computed

The table of docs/planning.md.
"""

from __future__ import annotations

from bench.markdown import table
from hessfunc.app.plan import (
    Lanczos,
    Machine,
    Plan,
    Remedy,
    Setting,
    Transformer,
    fewest_ranks,
    gradient_seconds,
    plan,
    whole,
)

GIB = 2**30
SIZES = {"125M": 125e6, "1B": 1e9, "7B": 7e9, "70B": 70e9}
RANKS = (1, 8, 64, 512)
# As `hessfunc plan` assumes them: 40 % of an H100 without TF32, and in bfloat16.
FLOPS = {"float32": 0.4 * 67e12, "bfloat16": 0.4 * 989e12}
TOKENS = 2**20
SEQUENCE = 2048
# Of an H100 and of an H200, less what CUDA takes.
MEMORIES = {"80 GiB": 77 * GIB, "141 GB": round(141e9) - 3 * GIB}
OF_TIME = 64


def computed() -> str:
    """Ten eigenpairs in 100 products, vectors sharded, layers computed again."""
    on = [f"GiB on {ranks:,} rank{'s' * (ranks > 1)}" for ranks in RANKS]
    fewest = [f"ranks of {memory}" for memory in MEMORIES]
    of_step = [f"GiB sent a step, {OF_TIME} ranks", "seconds a step"]
    head = ["parameters", "layers x width", "in", *on, "replicated", *fewest, *of_step]
    rows = [head]
    for name, params in SIZES.items():
        for dtype in FLOPS:
            rows.append([name, *_row(Transformer.usual(round(params)), dtype)])
    return table(rows)


def _row(shape: Transformer, dtype: str) -> list[str]:
    network = shape.network(dtype, tokens=SEQUENCE, context=SEQUENCE).computed_again()
    algorithm = Lanczos(k=10, steps=100)
    plans = [plan(Setting(network, ranks), algorithm) for ranks in RANKS]
    run = Remedy("", plans[0].setting, algorithm)
    fewest = [fewest_ranks(run, memory) for memory in MEMORIES.values()]
    sent, seconds = _step(plan(Setting(network, OF_TIME), algorithm), FLOPS[dtype])
    return [
        f"{shape.layers} x {shape.width:,}",
        dtype,
        *(f"{one.peak.total / GIB:,.1f}" for one in plans),
        f"{whole(plans[0].setting, algorithm) / GIB:,.1f}",
        *("none" if ranks is None else f"{ranks:,}" for ranks in fewest),
        f"{sent / GIB:,.1f}",
        f"{seconds:,.1f}",
    ]


def _step(found: Plan, flops: float) -> tuple[float, float]:
    """Bytes that a rank sends in a step, and the seconds of it."""
    setting = found.setting
    params, ranks = setting.network.params, setting.ranks
    machine = Machine(
        gradient_seconds=gradient_seconds(params, TOKENS / ranks, flops),
        memory_bandwidth=2000 * GIB,
        network_bandwidth=20 * GIB,
        latency=50e-6,
        product_gradients=3.0,
    )
    cost = machine.cost(setting, 1, found.algorithm.workload(setting))
    return cost.sent, cost.seconds


if __name__ == "__main__":
    print(computed())
