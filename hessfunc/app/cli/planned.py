"""What a plan looks like on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from hessfunc.app.plan import (
    Algorithm,
    Hutchinson,
    Lanczos,
    Machine,
    Plan,
    Remedy,
    Setting,
    Slq,
    Xtrace,
    fewest_ranks,
    plan,
    remedies,
    whole,
)

GIB = 2**30
# What it is, how much, and how that is known.
Number = tuple[str, str, str]


@dataclass(frozen=True)
class Verdict:
    """A plan, and whether there is room for it.

    Attributes:
        asked: the algorithm as it was asked for.
        plan: of the algorithm as it runs.
        room: bytes of each rank; None where these are not known.
        refusal: why the algorithm would not begin, if so.
    """

    asked: Algorithm
    plan: Plan
    room: int | None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        no_limit = self.room is None or self.plan.peak.total <= self.room
        return not self.refusal and no_limit


def judged(setting: Setting, asked: Algorithm, room: int | None, /) -> Verdict:
    """The plan of an algorithm in that room, or of what was asked for where it would not begin."""
    try:
        return Verdict(asked, plan(setting, asked, memory=room), room)
    except MemoryError as refusal:
        return Verdict(asked, plan(setting, asked), room, str(refusal))


def shown(
    verdict: Verdict, machine: Machine, numbers: Sequence[Number], /
) -> Iterator[Table | str]:
    """The tables and sentences of a plan, in their order."""
    found = verdict.plan
    yield _title(found)
    yield _memory(found)
    yield _moments(found)
    yield _cost(found, machine)
    yield _numbers(numbers)
    yield from _verdict(verdict)


def _title(found: Plan) -> str:
    setting = found.setting
    cut = "vectors sharded" if setting.sharded else "vectors whole on each"
    on = f"{setting.ranks:,} rank{'s' * (setting.ranks > 1)}, {cut}"
    return f"{_described(found.algorithm)}, {setting.network.params:,} parameters, {on}"


def _described(algorithm: Algorithm) -> str:
    match algorithm:
        case Lanczos():
            basis = f"basis of {algorithm.vectors} vectors"
            return f"lanczos: {algorithm.k} pairs, {algorithm.steps} products, {basis}"
        case Slq():
            at_once = f", {algorithm.at_once} at once" if algorithm.groups > 1 else ""
            probes = f"{algorithm.probes} probe{'s' * (algorithm.probes > 1)}"
            return f"slq: {probes}{at_once} of {algorithm.steps} steps"
        case Hutchinson() | Xtrace():
            name = type(algorithm).__name__.lower()
            return f"{name}: {algorithm.probes} probes, {algorithm.at_once} at once"
    raise TypeError(f"no words for {algorithm}")


def _columns(*names: str) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column(names[0], no_wrap=True)
    for name in names[1:]:
        drawn.add_column(name, justify="right", no_wrap=True)
    return drawn


def _memory(found: Plan) -> Table:
    drawn = _columns(f"each rank holds at its peak, in {found.peak.name}", "GiB")
    for what, size in found.peak.held.items():
        if size:
            drawn.add_row(what, _gib(size))
    drawn.add_section()
    drawn.add_row("all", _gib(found.peak.total))
    return drawn


def _moments(found: Plan) -> Table:
    drawn = _columns("and at other places", "GiB")
    for moment in found.moments:
        if moment is not found.peak:
            drawn.add_row(moment.name, _gib(moment.total))
    return drawn


def _cost(found: Plan, machine: Machine) -> Table:
    setting = found.setting
    work = found.algorithm.work(setting)
    step, run = machine.cost(setting, work.block, work), machine.in_all(setting, work)
    drawn = _columns("each rank sends and takes", "a step", f"{work.products:,} products at most")
    rows = [
        ("sums over batches, GiB", step.reduced / GIB, run.reduced / GIB),
        ("blocks to be whole, GiB", step.gathered / GIB, run.gathered / GIB),
        ("inner products, GiB", step.sums / GIB, run.sums / GIB),
        ("sent, GiB", step.sent / GIB, run.sent / GIB),
        ("passes through the network, s", step.products, run.products),
        ("reading the basis, s", step.vectors, run.vectors),
        ("sending, s", step.wire, run.wire),
        ("time, s", step.seconds, run.seconds),
    ]
    for name, *values in rows:
        drawn.add_row(
            name, *(f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}" for value in values)
        )
        if name.startswith("sent"):
            drawn.add_section()
    return drawn


def _numbers(numbers: Sequence[Number]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("the plan rests on", "", "which is"):
        drawn.add_column(column)
    for number in numbers:
        drawn.add_row(*number)
    return drawn


def _verdict(verdict: Verdict) -> Iterator[Table | str]:
    found, room = verdict.plan, verdict.room
    if room is None:
        return
    asked, runs = _described(verdict.asked), _described(found.algorithm)
    if asked != runs:
        yield f"Vectors take half of what is free at the most, so {asked} becomes {runs}."
    limit = f"{_gib(room)} GiB of each rank"
    if verdict.fits:
        yield f"It fits: {_gib(found.peak.total)} of {limit}."
        return
    why = verdict.refusal or f"{_gib(found.peak.total)} GiB are needed"
    yield f"It does not fit in {limit}: {why}."
    yield _remedies(found.setting, verdict.asked, room)
    yield _more_ranks(found.setting, verdict.asked, room)


def _remedies(setting: Setting, algorithm: Algorithm, room: int) -> Table:
    ranks = f"on {setting.ranks:,} rank{'s' * (setting.ranks > 1)}"
    drawn = _columns("what would take less", f"GiB {ranks}", "fits", "fewest ranks")
    for remedy in remedies(setting, algorithm):
        fewest = fewest_ranks(remedy, room)
        drawn.add_row(
            remedy.how,
            _gib(remedy.peak),
            "yes" if remedy.fits(room) else "no",
            "none" if fewest is None else f"{fewest:,}",
        )
    return drawn


def _more_ranks(setting: Setting, algorithm: Algorithm, room: int) -> str:
    fewest = fewest_ranks(Remedy("more ranks", setting, algorithm), room)
    if fewest is not None:
        return f"With sharded vectors, and all else as it is, {fewest:,} ranks are enough."
    return (
        f"More ranks alone do not help: each holds {_gib(whole(setting, algorithm))} GiB whole, "
        "however many there are. Where nothing helps, take the curvature of a part of the "
        "parameters: hf.split, hf.hold."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
