"""The tables of a run: ratios with their spread, and where and when they were measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

import hessfunc
from bench.interleaved import Ratio, ratio
from bench.markdown import table

GRADIENT = "gradient"
KEPT = "autograd, graph kept"
REBUILT = "autograd, graph rebuilt"
DEFAULT = "reverse, auto"
DIFFERENCE = "difference"

# Beyond this the automatic choice of a chunk is called wrong, and not noise.
_WRONG_CHOICE = 1.1


@dataclass(frozen=True)
class Product:
    """The price of one product, a block's divided by its vectors.

    Attributes:
        kept: times plain double backward on a kept graph.
        rebuilt: times plain double backward that makes its graph each time.
        gradients: times one gradient.
        error: relative to plain double backward.
    """

    kept: Ratio
    rebuilt: Ratio
    gradients: Ratio
    error: float


@dataclass(frozen=True)
class Measured:
    """One net and block size.

    Attributes:
        title: of the net.
        n: its parameters.
        k: the vectors of the block.
        rounds: how often each alternative was timed.
        gradient_seconds: of one gradient, the median over rounds; noise on a shared machine.
        products: by alternative.
        choices: the time of the automatic choice of a chunk, times the faster of loop and vmap,
            by mode.
    """

    title: str
    n: int
    k: int
    rounds: int
    gradient_seconds: float
    products: dict[str, Product]
    choices: dict[str, Ratio]


def measured(
    title: str,
    n: int,
    k: int,
    seconds: Mapping[str, Sequence[float]],
    errors: Mapping[str, float],
) -> Measured:
    """The ratios of the seconds of one net and block size.

    Args:
        title: of the net.
        n: its parameters.
        k: the vectors of the block.
        seconds: of each alternative, round by round: a gradient, one product with the graph
            rebuilt, and k products of all others.
        errors: of the alternatives, relative to the kept graph's products.
    """
    each = {
        which: times if which in (GRADIENT, REBUILT) else [t / k for t in times]
        for which, times in seconds.items()
    }
    products = {
        which: Product(
            kept=ratio(each[which], each[KEPT]),
            rebuilt=ratio(each[which], each[REBUILT]),
            gradients=ratio(each[which], each[GRADIENT]),
            error=errors.get(which, 0.0),
        )
        for which in (KEPT, *errors)
    }
    choices = {}
    for mode in ("reverse", "forward"):
        both = [each[name] for how in ("loop", "vmap") if (name := f"{mode}, {how}") in each]
        if both:
            choices[mode] = ratio(each[f"{mode}, auto"], min(both, key=median))
    rounds, unit = len(seconds[GRADIENT]), median(seconds[GRADIENT])
    return Measured(title, n, k, rounds, unit, products, choices)


def markdown(results: Sequence[Measured], environment: Mapping[str, object]) -> str:
    """The tables, one a net."""
    titles = dict.fromkeys(result.title for result in results)
    return "\n\n".join(
        [
            "# The cost of a Hessian product",
            ", ".join(f"{key}: {value}" for key, value in environment.items()),
            "Of each product of a block, times plain autograd on a kept graph (median over rounds "
            "of the ratio in a round, and its quartiles); times plain autograd with the graph "
            "rebuilt for each product; and in gradients of the same loss on the same batch.",
            *(_of_net([r for r in results if r.title == title]) for title in titles),
        ]
    )


def _of_net(results: Sequence[Measured]) -> str:
    ks = [f"k = {result.k}" for result in results]
    # The baselines stand first; a large block has all alternatives.
    ours = (name for result in reversed(results) for name in result.products)
    names = dict.fromkeys([KEPT, REBUILT, *ours])
    units = ("/ kept", "/ rebuilt", "gradients")
    rows = [["", *(f"{unit}, {k}" for unit in units for k in ks), "error"]]
    for name in names:
        found = [result.products.get(name) for result in results]
        rows.append(
            [
                name,
                *(_with_spread(p.kept) if p else "" for p in found),
                *(f"{p.rebuilt.median:.2f}" if p else "" for p in found),
                *(f"{p.gradients.median:.2f}" if p else "" for p in found),
                f"{max(p.error for p in found if p):.0e}",
            ]
        )
    about = "; ".join(
        f"{k}: {r.rounds} rounds, a gradient in {1e3 * r.gradient_seconds:.3g} ms"
        for k, r in zip(ks, results, strict=True)
    )
    parts = [f"## {results[0].title}, n = {results[0].n:,}", table(rows), f"{about}."]
    wrong = [
        f"{mode} at k = {result.k} takes {_with_spread(choice)} times the faster of loop and vmap"
        for result in results
        for mode, choice in result.choices.items()
        if choice.low > _WRONG_CHOICE
    ]
    if wrong:
        parts.append(f"The automatic chunk: {'; '.join(wrong)}.")
    return "\n\n".join(parts)


def _with_spread(found: Ratio) -> str:
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def environment() -> dict[str, object]:
    """Where and when, and with which versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "threads that wait": os.environ.get("OMP_WAIT_POLICY", "default").lower(),
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hessfunc": hessfunc.__version__,
    }


def processor() -> str:
    """Return the processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write(results: Sequence[Measured], folder: Path) -> tuple[str, Path]:
    """The tables, and the file in ``folder`` to which they are written, beside their JSON."""
    about = environment()
    text = markdown(results, about)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"products-{about['date']}.md".replace(":", "")
    path.write_text(f"{text}\n")
    record = {"environment": about, "results": [asdict(result) for result in results]}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1))
    return text, path
