"""What is aimed at, and whether it is met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.interleaved import Ratio
from bench.speed.asked import BY_TORCH
from bench.speed.cells import Cell, Row
from bench.speed.models import MODELS
from bench.speed.turns import NOT_INSTALLED

_NETS = (
    "mlp-small",
    "mlp-wide",
    "gpt",
    "llama",
    "vit",
    "stories260k",
    "resnet20-trained",
    "resnet20",
)


@dataclass(frozen=True)
class Target:
    """A bound of ours / the best of the other libraries.

    Attributes:
        work: for the table.
        question: of the cells.
        nets: of the cells.
        at_most: the bound.
        ours: which of ours.
    """

    work: str
    question: str
    nets: tuple[str, ...]
    at_most: float
    ours: str = "hessfunc"


TARGETS = [
    Target("one product, repeated, same batch", "product", _NETS, 1.05),
    Target("block of 16: MLPs", "block", ("mlp-small", "mlp-wide"), 0.5),
    Target("block of 16: GPT, Llama, ViT", "block", ("gpt", "llama", "vit", "stories260k"), 0.8),
    Target("the same, compiled", "compiled", ("gpt", "llama", "vit"), 0.65, "hessfunc, compiled"),
    Target("block of 8: ResNet-20", "block", ("resnet20-trained", "resnet20"), 0.9),
    Target("GGN, block of 16 (ResNet-20: 8)", "ggn", _NETS, 0.8),
    Target(
        "data set of 20 batches, block of 8", "data", ("mlp-wide", "gpt", "resnet20-trained"), 0.6
    ),
    Target(
        "top 10 eigenpairs, residual 1e-3",
        "eigenpairs",
        ("resnet20-trained",),
        0.5,
        "hessfunc, lanczos",
    ),
    Target(
        "the same, no search for repeated ones",
        "eigenpairs",
        ("resnet20-trained",),
        0.5,
        "hessfunc, lanczos, no search",
    ),
    Target("trace to 2 %", "trace", ("resnet20-trained",), 0.4, "hessfunc, hessian_trace"),
    Target("density, 100 steps x 4 probes", "density", ("gpt",), 0.7, "hessfunc, slq"),
    Target(
        "peak memory, same mode and block", "memory", ("mlp-wide", "gpt", "resnet20-trained"), 1.0
    ),
]


@dataclass(frozen=True)
class Verdict:
    """A target for one net.

    Attributes:
        target: which.
        net: its title.
        of_peer: ours / the best of the other libraries; nothing where one of them has no answer.
        peer: the best of the other libraries.
        of_plain: ours / the best of plain autograd.
        by_torch: Ours / the best peer, with torch's own matrix library on both sides.
        ours: the row of ours.
        floor: of the cell.
        why: where there is no ratio.
        missing: Libraries that could not be compared, as they are not installed.
    """

    target: Target
    net: str
    of_peer: Ratio | None = None
    peer: str = ""
    of_plain: Ratio | None = None
    by_torch: Ratio | None = None
    ours: Row | None = None
    floor: float | None = None
    why: str = ""
    missing: Sequence[str] = ()

    @property
    def met(self) -> bool | None:
        return self.of_peer and self.of_peer.median <= self.target.at_most


def verdicts(cells: Mapping[str, Cell]) -> list[Verdict]:
    """In the order of the targets; memory has a line for each way that others go as well."""
    found: list[Verdict] = []
    for target in TARGETS:
        for net in target.nets:
            cell = cells.get(f"{target.question}/{net}")
            if cell is None or cell.absent:
                title = MODELS[net].title
                found.append(Verdict(target, title, why=cell.absent if cell else "not measured"))
            elif target.question == "memory":
                found += _of_memory(target, cell)
            else:
                found.append(_of_time(target, cell))
    return found


def _of_time(target: Target, cell: Cell) -> Verdict:
    ours = cell.rows.get(target.ours)
    if ours is None or not _right(ours, cell):
        error = f"an error of {ours.error:.0e}" if ours and ours.error else "not measured"
        why = cell.gaps.get(target.ours) or error
        return Verdict(target, cell.title, floor=cell.floor, why=why)
    peer, plain = (_cheapest(cell, kind) for kind in ("peer", "plain"))
    return Verdict(
        target,
        cell.title,
        cell.rows[peer].ours[target.ours] if peer else None,
        peer,
        cell.rows[plain].ours[target.ours] if plain else None,
        cell.rows[peer].ours.get(by_torch(cell, target.ours)) if peer else None,
        ours,
        cell.floor,
        "" if peer else "no other library has an answer",
        [title for title, reason in cell.gaps.items() if reason.startswith(NOT_INSTALLED)],
    )


def by_torch(cell: Cell, ours: str) -> str:
    """Return the title of an alternative of ours with torch's own matrix products.

    Where hessfunc uses no other library, that is the alternative itself.
    """
    return ours if cell.about.get("matrices, hessfunc") == "torch's" else f"{ours}{BY_TORCH}"


def _cheapest(cell: Cell, kind: str) -> str:
    costs = {
        title: row.gradients.median
        for title, row in cell.rows.items()
        if row.kind == kind and row.gradients and _right(row, cell)
    }
    return min(costs, key=costs.__getitem__, default="")


def _of_memory(target: Target, cell: Cell) -> list[Verdict]:
    found = []
    for alike in dict.fromkeys(row.alike for row in cell.rows.values()):
        group = {
            title: row
            for title, row in cell.rows.items()
            if row.alike == alike and row.bytes is not None and _right(row, cell)
        }
        ours = next((row for row in group.values() if row.kind == "ours"), None)
        peer, plain = (_least(group, kind) for kind in ("peer", "plain"))
        if ours and peer:
            of_peer, of_plain = (_shares(ours, group, title) for title in (peer, plain))
            net = f"{cell.title}: {alike}"
            found.append(Verdict(target, net, of_peer, peer, of_plain, ours=ours, floor=cell.floor))
    return found


def _least(group: Mapping[str, Row], kind: str) -> str:
    sizes = {title: row.bytes or 0 for title, row in group.items() if row.kind == kind}
    return min(sizes, key=sizes.__getitem__, default="")


def _shares(ours: Row, group: Mapping[str, Row], title: str) -> Ratio | None:
    if not title:
        return None
    share = (ours.bytes or 0) / max(group[title].bytes or 0, 1)
    return Ratio(share, share, share)


def _right(row: Row, cell: Cell) -> bool:
    return row.error is None or cell.tolerance is None or row.error <= cell.tolerance


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is below in both, by the first."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found
