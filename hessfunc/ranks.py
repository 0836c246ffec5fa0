"""Collectives among the ranks of a mesh, which fail together on every rank.

These collectives run outside of torch's transforms; `autograd.collectives` makes functions of them
that can be transformed. No collective of an algorithm begins before all ranks have reported
that they are ready for it. A rank that fails or disagrees therefore raises an error on every rank,
and no rank waits for a message that never comes.
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

# torch 2.13 renamed these functions, and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Relative tolerance of numbers that must agree: different processors round sums differently.
ALIKE = 1e-9


@dataclass(frozen=True, eq=False)
class Ranks:
    """Group of processes that take part in the same collectives.

    Attributes:
        name: Name of the process group. The group itself is not stored, because it may be
            destroyed earlier than this object.
        size: Number of ranks.
        rank: Rank of this process in the group.
    """

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh, axis: str | None = None, /) -> Ranks:
        """Return the ranks along an axis of a mesh, or all ranks of the mesh.

        Args:
            mesh: Device mesh that contains this process.
            axis: Name of an axis; the result has the ranks along it that include this process.
                None stands for all ranks of the mesh.

        Raises:
            TypeError: If ``mesh`` is not a DeviceMesh.
            ValueError: If the mesh does not contain this process or has no such axis.
        """
        refuse_unless_mesh(mesh)
        _refuse_outside(mesh)
        if axis is not None and axis not in (mesh.mesh_dim_names or ()):
            raise ValueError(
                f"the mesh has no axis {axis!r}: name one of its axes {mesh.mesh_dim_names}"
            )
        if axis is None and mesh.ndim > 1:
            return cls.apart(mesh)
        return cls._of(mesh.get_group(axis))

    @classmethod
    def apart(cls, mesh: DeviceMesh, /) -> Ranks:
        """Return all ranks of a mesh, in a process group that no model uses.

        If a rank fails inside a model, the others wait in the model's next collective. The failing
        rank must report the failure in another group. Otherwise the others would receive the
        report as the message that they wait for, and gloo would abort.

        Raises:
            ValueError: If the mesh does not contain this process.
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
        """Divide ``range(count)`` into one contiguous range per rank, as evenly as possible."""
        ends = [count * r // self.size for r in range(self.size + 1)]
        return [range(a, b) for a, b in pairwise(ends)]

    def sum(self, numbers: Tensor, /) -> Tensor:
        """Return the sum over ranks, with the same bits on each rank.

        A contiguous tensor is summed in place.
        """
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def reduced(self, parts: Tensor, /) -> Tensor:
        """Return part r of the sum over ranks of ``parts`` (size, length), on rank r."""
        mine = parts.new_empty(parts.shape[1:])
        with _in_contact():
            _reduce_scatter(mine, parts.flatten(0, 1), group=self.group)
        return mine

    def least(self, number: int, /, device: torch.device) -> int:
        """Return the least of the integers of all ranks."""
        least = torch.tensor([number], dtype=torch.int64, device=device)
        return int(self._reduced(least, dist.ReduceOp.MIN))

    def _reduced(self, numbers: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        numbers = numbers.contiguous()
        with _in_contact():
            dist.all_reduce(numbers, how, group=self.group)
        return numbers

    def gathered(self, part: Tensor, lengths: Sequence[int], /) -> list[Tensor]:
        """Gather the parts of all ranks, given the length of the first axis of each part."""
        if not max(lengths):
            return [part] * self.size
        padded = self._padded(part, max(lengths)).split(max(lengths))
        return [x[:length] for x, length in zip(padded, lengths, strict=True)]

    def joined(self, part: Tensor, lengths: Sequence[int], /) -> Tensor:
        """Gather the parts of all ranks, concatenated along the first axis."""
        if set(lengths) == {lengths[0]} != {0}:
            # Parts of equal length arrive concatenated, which saves a copy of a large block.
            return self._padded(part, lengths[0])
        return torch.cat(self.gathered(part, lengths))

    def _padded(self, part: Tensor, longest: int) -> Tensor:
        """Gather the parts, padded to the length of the longest one and concatenated."""
        rest = part.shape[1:]
        mine = part.contiguous()
        if len(part) < longest:
            mine = part.new_zeros(longest, *rest)
            mine[: len(part)] = part
        padded = part.new_empty(self.size * longest, *rest)
        with _in_contact():
            _all_gather(padded, mine, group=self.group)
        return padded

    def objects(self, one: Made, /) -> list[Made]:
        """Gather the object of each rank on every rank."""
        gathered: list[Made | None] = [None] * self.size
        with _in_contact():
            dist.all_gather_object(gathered, one, group=self.group)
        return gathered  # type: ignore[return-value]

    def all_do(self, act: Callable[[], Made], /, device: torch.device) -> Made:
        """Return the result of ``act()`` if the call succeeds on all ranks.

        Args:
            act: Function without collectives.
            device: Device of the collective that reports failures.

        Raises:
            RuntimeError: If ``act`` failed on another rank only. A rank on which it failed raises
                the original error.
        """
        made, failure = attempted(act)
        self.told([], device, failure)
        return made[0]

    def agree(self, same: Mapping[str, float], /, device: torch.device) -> None:
        """Raise on every rank unless all ranks have the same numbers.

        Args:
            same: Numbers by name, with the same names on each rank.
            device: Device of the collective.

        Raises:
            ValueError: If the numbers differ.
        """
        table = self.told(list(same.values()), device)
        for name, values in zip(same, zip(*table, strict=True), strict=True):
            if not all(math.isclose(v, values[0], rel_tol=ALIKE) for v in values):
                raise ValueError(
                    f"the ranks disagree on {name}: {by_rank(values)}; make it equal on all ranks"
                )

    def alike(self, own: Mapping[str, object], /) -> None:
        """Raise on every rank unless all ranks have equal values.

        Args:
            own: Plain values of this rank by name.

        Raises:
            ValueError: If the values of a name differ.
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
        """Gather the numbers of all ranks on each rank, or raise if a rank reports a failure.

        Args:
            numbers: Numbers of this rank; each rank passes the same count.
            device: Device of the collective.
            failure: Exception raised on this rank before the call, if any.

        Returns:
            Numbers of each rank.

        Raises:
            RuntimeError: If only other ranks report a failure. A rank with a failure raises that
                failure itself.
            ConnectionError: If another rank does not take part. Its cause is the failure of this
                rank, if any.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.tensor([[failure is not None, *numbers]], dtype=dtype, device=device)
        try:
            table: list[list[float]] = self.joined(mine, [1] * self.size).tolist()
        except ConnectionError as lost:
            # The failure on this rank may be the reason why the others did not take part.
            raise lost from failure or lost.__cause__
        if any(row[0] for row in table):
            self._tell(failure)
        return [row[1:] for row in table]

    def _tell(self, failure: Exception | None) -> None:
        texts = self.objects("" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
        raise RuntimeError("failed on another rank, so this rank stops: " + "; ".join(failed))


def by_rank(values: Sequence[float], /) -> str:
    """Return the number of each rank as text for a message."""
    return ", ".join(f"rank {rank} has {value:.12g}" for rank, value in enumerate(values))


def attempted(act: Callable[[], Made], /) -> tuple[Sequence[Made], Exception | None]:
    """Call ``act`` and return ``((result,), None)``, or ``((), exception)`` if it raises."""
    try:
        return (act(),), None
    except Exception as failure:
        return (), failure


def refuse_unless_mesh(mesh: object, /) -> None:
    """Raise TypeError for anything but a device mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a DeviceMesh, not a {type(mesh).__name__}: pass "
            'mesh=init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))'
        )


def _refuse_outside(mesh: DeviceMesh) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the mesh {mesh}: call this only on ranks of the mesh"
        )


# Names of the process groups of all ranks, by mesh.
_of_all: WeakKeyDictionary[DeviceMesh, str] = WeakKeyDictionary()


def _group_of_all(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the group of all ranks of a mesh, made once because that is itself a collective."""
    name = _of_all.get(mesh)
    if name is None or name not in _world.pg_names.values():
        ranks = mesh.mesh.flatten().tolist()
        group = dist.new_group(
            ranks,
            timeout=_timeout(mesh),
            # Ranks outside of the mesh do not take part in making the group.
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        assert group is not None
        _of_all[mesh] = name = group.group_name
    return _resolve_process_group(GroupName(name))


def _timeout(mesh: DeviceMesh) -> timedelta:
    """Return the timeout of the first axis of a mesh; torch's default is half an hour."""
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
            "or did not reach the same collective within the timeout of its process group. Restart "
            f"all ranks; `checkpoint='run.pt'` makes a run resume where it stopped ({lost})"
        ) from lost
