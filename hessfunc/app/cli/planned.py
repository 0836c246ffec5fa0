"""Tables and sentences that show a plan on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from hessfunc.app.plan import (
    Algorithm,
    Hutchinson,
    Lanczos,
    Machine,
    Plan,
    PowerIteration,
    Remedy,
    Setting,
    Slq,
    Xtrace,
    cheapest,
    fewest_ranks,
    plan,
    remedies,
    whole,
)
from hessfunc.app.terminal import table

GIB = 2**30
# Label, value, and source of a number: given, assumed, measured or counted.
Number = tuple[str, str, str]


@dataclass(frozen=True)
class Verdict:
    """Plan, and whether it fits in memory.

    Attributes:
        asked: Algorithm that was requested.
        plan: Plan of the algorithm as it runs, with a basis that may be smaller.
        room: Available bytes per rank; None if they are not known.
        refusal: Reason why the algorithm cannot start; empty if it can.
    """

    asked: Algorithm
    plan: Plan
    room: int | None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Whether the algorithm starts, and its peak memory is available."""
        no_limit = self.room is None or self.plan.peak.total <= self.room
        return not self.refusal and no_limit


def judged(setting: Setting, asked: Algorithm, room: int | None, /) -> Verdict:
    """Return the plan in the available memory, or the requested plan if that cannot start."""
    try:
        return Verdict(asked, plan(setting, asked, memory=room), room)
    except MemoryError as refusal:
        return Verdict(asked, plan(setting, asked), room, str(refusal))


def shown(
    verdict: Verdict, machine: Machine, numbers: Sequence[Number], /
) -> Iterator[Table | str]:
    """Yield the tables and sentences of a plan in the order of printing."""
    planned = verdict.plan
    yield _title(planned)
    yield _memory(planned)
    yield _moments(planned)
    yield _cost(planned, machine)
    yield table(("inputs of the plan", "", "source"), numbers, left=3)
    yield from _verdict(verdict, machine)


def as_data(verdict: Verdict, machine: Machine, numbers: Sequence[Number], /) -> dict[str, Any]:
    """Return a plan as plain data, with memory in bytes and times in seconds."""
    planned = verdict.plan
    workload = planned.algorithm.workload(planned.setting)
    cost = machine.in_all(planned.setting, workload)
    return {
        "title": _title(planned),
        "fits": verdict.fits,
        "refusal": verdict.refusal,
        "available": verdict.room,
        "peak": {"during": planned.peak.name, "total": planned.peak.total, **planned.peak.held},
        "moments": {moment.name: moment.total for moment in planned.moments},
        "products": workload.products,
        "sent": cost.sent,
        "communication_seconds": cost.wire,
        "seconds": cost.seconds,
        "inputs": {name: {"value": value, "source": source} for name, value, source in numbers},
    }


def _title(planned: Plan) -> str:
    setting = planned.setting
    layout = "vectors sharded" if setting.sharded else "vectors replicated"
    layout = "parameters and vectors sharded" if setting.divided else layout
    on = f"{setting.ranks:,} rank{'s' * (setting.ranks > 1)}, {layout}"
    return f"{_described(planned.algorithm)}, {setting.network.params:,} parameters, {on}"


def _described(algorithm: Algorithm) -> str:
    match algorithm:
        case Lanczos():
            basis = f"basis of {algorithm.vectors} vectors"
            return f"lanczos: {algorithm.k} pairs, {algorithm.steps} products, {basis}"
        case PowerIteration():
            return f"power: {algorithm.k} pairs, {algorithm.steps} products"
        case Slq():
            at_once = f", {algorithm.at_once} at once" if algorithm.groups > 1 else ""
            probes = f"{algorithm.probes} probe{'s' * (algorithm.probes > 1)}"
            return f"slq: {probes}{at_once} of {algorithm.steps} steps"
        case Hutchinson() | Xtrace():
            name = type(algorithm).__name__.lower()
            return f"{name}: {algorithm.probes} probes, {algorithm.at_once} at once"
    raise TypeError(f"no description of {algorithm}")


def _memory(planned: Plan) -> Table:
    held = [(name, _gib(size)) for name, size in planned.peak.held.items() if size]
    total = ("total", _gib(planned.peak.total))
    title = f"peak memory per rank, during {planned.peak.name}"
    return table((title, "GiB"), [*held, (), total])


def _moments(planned: Plan) -> Table:
    others = (moment for moment in planned.moments if moment is not planned.peak)
    rows = ((moment.name, _gib(moment.total)) for moment in others)
    return table(("memory during other phases", "GiB"), rows)


def _cost(planned: Plan, machine: Machine) -> Table:
    setting = planned.setting
    workload = planned.algorithm.workload(setting)
    step, run = (
        machine.cost(setting, workload.block_size, workload),
        machine.in_all(setting, workload),
    )
    numbers = (
        ("all-reduced sums, GiB", step.reduced / GIB, run.reduced / GIB),
        ("gathered blocks, weights, GiB", step.gathered / GIB, run.gathered / GIB),
        ("inner products, GiB", step.sums / GIB, run.sums / GIB),
        ("total sent, GiB", step.sent / GIB, run.sent / GIB),
        ("network passes, s", step.products, run.products),
        ("reading the basis, s", step.vectors, run.vectors),
        ("communication, s", step.wire, run.wire),
        ("total time, s", step.seconds, run.seconds),
    )
    rows: list[tuple[str, ...]] = [
        (name, *(f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}" for value in values))
        for name, *values in numbers
    ]
    rows.insert(4, ())
    return table(("cost per rank", "one step", f"at most {workload.products:,} products"), rows)


def _verdict(verdict: Verdict, machine: Machine) -> Iterator[Table | str]:
    planned, room = verdict.plan, verdict.room
    if room is None:
        return
    asked, runs = _described(verdict.asked), _described(planned.algorithm)
    if asked != runs:
        yield f"Vectors may use at most half of the free memory, so {asked} becomes {runs}."
    limit = f"{_gib(room)} GiB per rank"
    if verdict.fits:
        yield f"It fits: {_gib(planned.peak.total)} of {limit}."
        return
    why = verdict.refusal or f"{_gib(planned.peak.total)} GiB are needed"
    yield f"It does not fit in {limit}: {why}."
    yield _remedies(planned.setting, verdict.asked, room, machine)
    yield _cheapest(planned.setting, verdict.asked, room, machine)
    yield _more_ranks(planned.setting, verdict.asked, room)


def _cheapest(setting: Setting, algorithm: Algorithm, room: int, machine: Machine) -> str:
    if (remedy := cheapest(setting, algorithm, room, machine)) is None:
        return "No change fits on as many ranks."
    seconds = remedy.seconds(machine)
    times = seconds / Remedy("", setting, algorithm).seconds(machine)
    return (
        f"The cheapest change that fits: {remedy.how}, {seconds:,.3g} s, {times:.2f} times the run "
        "without a limit."
    )


def _remedies(setting: Setting, algorithm: Algorithm, room: int, machine: Machine) -> Table:
    ranks = f"on {setting.ranks:,} rank{'s' * (setting.ranks > 1)}"
    rows = []
    for remedy in remedies(setting, algorithm):
        fewest = fewest_ranks(remedy, room)
        rows.append(
            (
                remedy.how,
                _gib(remedy.peak),
                "yes" if remedy.fits(room) else "no",
                f"{remedy.seconds(machine):,.3g}",
                "none" if fewest is None else f"{fewest:,}",
            )
        )
    title = "changes that need less memory"
    return table((title, f"GiB {ranks}", "fits", "s", "fewest ranks"), rows)


def _more_ranks(setting: Setting, algorithm: Algorithm, room: int) -> str:
    fewest = fewest_ranks(Remedy("more ranks", setting, algorithm), room)
    if fewest is not None:
        return f"With sharded vectors and no other change, {fewest:,} ranks are enough."
    replicated = (
        f"More ranks alone do not help: {_gib(whole(setting, algorithm))} GiB are replicated on "
        "each of them. "
    )
    divided = Remedy("", replace(setting, divided=True), algorithm)
    known = setting.network.block is not None
    if known and (fewest := fewest_ranks(divided, room)) is not None:
        shard = 'functional(model, mesh=mesh, shard="layers.*")'
        return f"{replicated}With {shard}, {fewest:,} ranks are enough."
    return (
        f"{replicated}If no change is enough, take the curvature of a part of the parameters: "
        "hf.split, hf.hold."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
