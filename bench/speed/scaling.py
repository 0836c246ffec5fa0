"""What costs grow with: parameters, the batch, the vectors of a block, steps; memory with a basis.

Each point is the median of seconds over rounds in which all lines take turns; points of one line
are minutes apart at the most, but not in turn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

import hessfunc as hf
from bench import baselines
from bench.interleaved import Turns
from bench.speed import models, ours
from bench.speed.asked import Asked
from bench.speed.cells import Cell, Line
from bench.speed.device import device, on_device, wait
from bench.speed.models import Case
from bench.speed.peak import peak_of
from bench.speed.turns import Effort, taken
from hessfunc.app.problems.nets import mlp
from hessfunc.randomness import seeded

_BLOCK = 8


def _parameters(effort: Effort) -> Cell:
    def calls(n: int) -> Mapping[str, Callable[[], object]]:
        # 64 w + 2 w^2 + 10 w parameters of the weights.
        width = round((-74 + math.sqrt(74**2 + 8 * n)) / 4)
        with seeded(0):
            net = mlp([64, width, width, width, 10])
            inputs, targets = torch.randn(64, 64), torch.randint(10, (64,))
        batch = on_device(inputs), on_device(targets)
        return _products(Case("", net.to(device()), F.cross_entropy, *batch))

    sizes = [10**4, 10**5, 10**6, 10**7]
    return _lines("parameters of an MLP, batch 64", sizes, calls, effort, "parameters")


def _batch(effort: Effort) -> Cell:
    def calls(examples: int) -> Mapping[str, Callable[[], object]]:
        return _products(models.made("mlp-wide", examples))

    sizes = [16, 64, 256, 1024, 4096]
    return _lines("the batch of MLP 784-256-256-10", sizes, calls, effort, "examples")


def _products(case: Case) -> dict[str, Callable[[], object]]:
    return {
        "a gradient": partial(baselines.gradient, case),
        "one product": _call(Asked(case)),
        f"a block of {_BLOCK}": _call(Asked(case, k=_BLOCK)),
    }


def _call(asked: Asked) -> Callable[[], object]:
    call = ours.PRODUCTS[0].make(asked).call

    def to_its_end() -> None:
        call()
        wait()

    return to_its_end


def _vectors(name: str, effort: Effort) -> Cell:
    case = models.made(name)

    def calls(k: int) -> Mapping[str, Callable[[], object]]:
        return {"a block": _call(Asked(case, k=k))}

    return _lines(f"the block of {case.title}", [1, 2, 4, 8, 16, 32, 64], calls, effort, "vectors")


def _steps(effort: Effort) -> Cell:
    case = models.made("mlp-wide")
    matvec, params = ours.matvec_of(Asked(case))

    def calls(steps: int) -> Mapping[str, Callable[[], object]]:
        return {
            f"slq, probes={probes}": partial(
                hf.slq, matvec, params, probes=probes, steps=steps, seed=0
            )
            for probes in (1, 4)
        }

    return _lines(f"steps on {case.title}", [10, 20, 40, 80, 160], calls, effort, "steps")


def _lines(
    title: str,
    sizes: list[int],
    calls: Callable[[int], Mapping[str, Callable[[], object]]],
    effort: Effort,
    unit: str,
) -> Cell:
    costs: dict[str, list[float]] = {}
    for size in sizes:
        turns = Turns(calls(size))
        for call in turns.alternatives.values():
            call()
        taken(turns, replace(effort, seconds=effort.seconds / len(sizes)))
        for name, seconds in turns.seconds.items():
            costs.setdefault(name, []).append(statistics.median(seconds))
    lines = [Line(name, [float(s) for s in sizes], found) for name, found in costs.items()]
    return Cell(title, lines=lines, units=(unit, "seconds"))


def _basis(effort: Effort) -> Cell:
    sizes = [8, 16, 32, 64, 128, 256]
    peaks = [float(peak_of(f"basis/{size}", "")) for size in sizes]
    line = Line("lanczos, 500,000 parameters", [float(s) for s in sizes], peaks)
    return Cell("the basis of Lanczos", lines=[line], units=("vectors", "bytes"))


SCALINGS: dict[str, Callable[[Effort], Cell]] = {
    "parameters": _parameters,
    "batch": _batch,
    "vectors": partial(_vectors, "mlp-wide"),
    "vectors-gpt": partial(_vectors, "gpt"),
    "steps": _steps,
    "basis": _basis,
}
