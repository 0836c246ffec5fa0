"""The processes along one axis of a mesh, and what they tell each other.

Every collective is outside of torch's transforms, and none is begun before all ranks have said
that they are ready for the same one: so a rank that fails, or that asks for something else, is an
error on every rank, and none of them waits for what never comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    GroupName,
    _resolve_process_group,
    _world,
)

Made = TypeVar("Made")

# Its name from torch 2.13 on, which warns of the other.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
# Sums of the same numbers on unlike processors differ by their rounding.
ALIKE = 1e-9


@dataclass(frozen=True, eq=False)
class Ranks:
    """Processes that take part in the same collectives.

    Attributes:
        name: of their group, which is not held: it may be destroyed while this lives.
        size: how many there are.
        rank: which one this is.
    """

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh, axis: str | None = None, /) -> Ranks:
        """Those of an axis of a mesh that this process is among, or of all of a mesh of one axis.

        Raises:
            ValueError: this process is not of the mesh; the mesh has no such axis, or several.
        """
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                f"mesh is a {type(mesh).__name__}: pass a DeviceMesh, as of "
                'init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))'
            )
        _refuse_outside(mesh)
        if axis is not None and axis not in (mesh.mesh_dim_names or ()):
            raise ValueError(f"the mesh has no axis {axis!r}: its axes are {mesh.mesh_dim_names}")
        if axis is None and mesh.ndim > 1:
            return cls.apart(mesh)
        return cls._of(mesh.get_group(axis))

    @classmethod
    def apart(cls, mesh: DeviceMesh, /) -> Ranks:
        """All of a mesh, in a group in which no model sends.

        Where a rank fails within a model the others wait in the model's next collective. What it
        says of that must not reach them as the numbers that they wait for: gloo would abort.

        Raises:
            ValueError: this process is not of the mesh.
        """
        _refuse_outside(mesh)
        return cls._of(_group_of_all(mesh))

    @classmethod
    def _of(cls, group: dist.ProcessGroup) -> Ranks:
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group))

    @property
    def group(self) -> dist.ProcessGroup:
        return _resolve_process_group(GroupName(self.name))

    def parts(self, count: int, /) -> list[range]:
        """The numbers below ``count`` in runs, one a rank, as even as may be."""
        ends = [count * r // self.size for r in range(self.size + 1)]
        return [range(a, b) for a, b in pairwise(ends)]

    def sum(self, numbers: Tensor, /) -> Tensor:
        """The sum over ranks, the same bits on each; in place where that can be."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def least(self, number: int, /, device: torch.device) -> int:
        """The least of the numbers of the ranks."""
        found = torch.tensor([number], dtype=torch.int64, device=device)
        return int(self._reduced(found, dist.ReduceOp.MIN))

    def _reduced(self, numbers: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        numbers = numbers.contiguous()
        with _in_contact():
            dist.all_reduce(numbers, how, group=self.group)
        return numbers

    def gathered(self, part: Tensor, lengths: Sequence[int], /) -> list[Tensor]:
        """The parts of all ranks, which differ in the length of their first axis."""
        if not max(lengths):
            return [part] * self.size
        found = self._padded(part, max(lengths)).split(max(lengths))
        return [x[:length] for x, length in zip(found, lengths, strict=True)]

    def joined(self, part: Tensor, lengths: Sequence[int], /) -> Tensor:
        """The parts of all ranks, one behind another."""
        if set(lengths) == {lengths[0]} != {0}:
            # They arrive so: a large block is not copied once more.
            return self._padded(part, lengths[0])
        return torch.cat(self.gathered(part, lengths))

    def _padded(self, part: Tensor, longest: int) -> Tensor:
        """The parts one behind another, each with what makes it as long as the longest."""
        rest = part.shape[1:]
        mine = part.contiguous()
        if len(part) < longest:
            mine = part.new_zeros(longest, *rest)
            mine[: len(part)] = part
        found = part.new_empty(self.size * longest, *rest)
        with _in_contact():
            _all_gather(found, mine, group=self.group)
        return found

    def objects(self, one: Made, /) -> list[Made]:
        """What each rank has, on every rank."""
        found: list[Made | None] = [None] * self.size
        with _in_contact():
            dist.all_gather_object(found, one, group=self.group)
        return found  # type: ignore[return-value]

    def all_do(self, act: Callable[[], Made], /, device: torch.device) -> Made:
        """What ``act``, which waits for no other rank, returns here, if it fails nowhere.

        Raises:
            RuntimeError: it failed on another rank. Its own error, on the rank where it failed.
        """
        made, failure = attempted(act)
        self.told([], device, failure)
        return made[0]

    def agree(self, same: Mapping[str, float], /, device: torch.device) -> None:
        """Raise on every rank unless all have the same numbers.

        Args:
            same: what each rank must have alike, by name, and as many on each.
            device: of the collective.

        Raises:
            ValueError: the numbers differ.
        """
        table = self.told(list(same.values()), device)
        for name, values in zip(same, zip(*table, strict=True), strict=True):
            if not all(math.isclose(v, values[0], rel_tol=ALIKE) for v in values):
                raise ValueError(f"the ranks disagree on {name}: {by_rank(values)}")

    def alike(self, own: Mapping[str, object], /) -> None:
        """Raise on every rank unless all have equal values.

        Args:
            own: Plain values by name.

        Raises:
            ValueError: The values of a name differ.
        """
        table = self.objects(dict(own))
        for name in dict.fromkeys(name for row in table for name in row):
            values = [row.get(name) for row in table]
            if any(value != values[0] for value in values):
                shown = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
                raise ValueError(
                    f"the ranks disagree on {name}: {shown}; pass the same value on all ranks"
                )

    def told(
        self,
        numbers: Sequence[float],
        /,
        device: torch.device,
        failure: Exception | None = None,
    ) -> list[list[float]]:
        """The numbers of all ranks, on each, if all are well.

        Args:
            numbers: of this rank, as many on each.
            device: of the collective.
            failure: what went wrong on this rank.

        Raises:
            RuntimeError: another rank failed. The failure itself, on the rank where it came up.
            ConnectionError: another rank has not come; its cause is the failure, if any, on this.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.tensor([[failure is not None, *numbers]], dtype=dtype, device=device)
        try:
            table: list[list[float]] = self.joined(mine, [1] * self.size).tolist()
        except ConnectionError as lost:
            # What failed here may be why the others have not come.
            raise lost from failure or lost.__cause__
        if any(row[0] for row in table):
            self._tell(failure)
        return [row[1:] for row in table]

    def _tell(self, failure: Exception | None) -> None:
        told = self.objects("" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]
        raise RuntimeError("failed on another rank, so this one stops: " + "; ".join(failed))


def by_rank(values: Sequence[float], /) -> str:
    """The number of each rank, in words."""
    return ", ".join(f"rank {rank} has {value:.12g}" for rank, value in enumerate(values))


def attempted(act: Callable[[], Made], /) -> tuple[Sequence[Made], Exception | None]:
    """What ``act`` returns, if it does, and what it raised, if it did."""
    try:
        return (act(),), None
    except Exception as failure:
        return (), failure


def _refuse_outside(mesh: DeviceMesh) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not of the mesh {mesh}")


# The names of groups of all ranks of a mesh.
_of_all: WeakKeyDictionary[DeviceMesh, str] = WeakKeyDictionary()


def _group_of_all(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a mesh, made once: making one is a collective of its own."""
    name = _of_all.get(mesh)
    if name is None or name not in _world.pg_names.values():
        ranks = mesh.mesh.flatten().tolist()
        group = dist.new_group(
            ranks,
            timeout=_timeout(mesh),
            # Ranks outside of the mesh do not come here, and are not waited for.
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        assert group is not None
        _of_all[mesh] = name = group.group_name
    return _resolve_process_group(GroupName(name))


def _timeout(mesh: DeviceMesh) -> timedelta:
    """That of its first axis, where torch would take half an hour."""
    backend = mesh.get_group(0)._get_backend(torch.device(mesh.device_type))
    return backend.options._timeout


@contextmanager
def _in_contact() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as lost:
        raise ConnectionError(
            f"rank {dist.get_rank()} has lost contact with the other ranks: one of them has ended, "
            "or has not come to the same place within the timeout of its process group. Start all "
            f"again: with `checkpoint=` a run goes on from where it was ({lost})"
        ) from lost
