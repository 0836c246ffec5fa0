"""Tensors that a matvec reads besides its block, and the refusal of changes to them.

The products of a matvec belong to one matrix only if nothing that the loss reads changes between
them. Parameters of the matvec are copied. Other parameters, which are frozen or held fixed, are not
copied, because copies would double the memory of a large model. Buffers are copied by each
evaluation, so that changes matter only where products evaluate the loss again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

Named: TypeAlias = dict[int, tuple[str, Tensor]]

# Number of entries of a tensor that `unwritten` compares, about.
_COMPARED = 16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIXED = "Its products would mix old and new values: make the matvec again"


def unchanged(
    names: Sequence[str], tensors: Sequence[Tensor], /, versions: Sequence[int | None] | None = None
) -> Callable[[], None]:
    """Return a function that raises if one of these leaves has since been changed in place.

    Args:
        names: Name of each leaf, for the message.
        tensors: Leaves.
        versions: Version of each leaf that was read. None is the present one.
    """
    since = [_version(leaf) for leaf in tensors] if versions is None else versions
    tracked = [
        (name, leaf, version)
        for name, leaf, version in zip(names, tensors, since, strict=True)
        if version is not None
    ]

    def refuse_if_changed() -> None:
        if torch.compiler.is_compiling():
            # Compiled functions read their leaves in each call.
            return
        for name, leaf, version in tracked:
            if leaf._version != version:
                raise RuntimeError(
                    f"{name!r} has changed in place since this matvec was made, for instance by an "
                    f"optimiser step. {_MIXED}"
                )

    return refuse_if_changed


def _version(leaf: Tensor) -> int | None:
    """Return the number of changes of a tensor in place, None for an inference tensor."""
    return None if leaf.is_inference() else leaf._version


def unwritten(
    names: Sequence[str], tensors: Sequence[Tensor], /, *, again: bool
) -> Callable[[], None]:
    """Return a function that raises if values of these leaves have since been overwritten.

    Writes through ``.data`` or NumPy do not change the version of a tensor, which `unchanged`
    compares. This function compares the bits of about 16 entries of each leaf, evenly spaced along
    each axis. It finds every write to a whole leaf, and may miss a write to a few rows. Tensors of
    a transform, complex tensors and tensors on the meta device are not compared.

    Args:
        names: Name of each leaf, for the message.
        tensors: Leaves.
        again: Whether products read the leaves again, so that a leaf must not get other memory
            either, as by ``leaf.data = other``. Kept graphs refer to the memory itself.

    Cost: about half a microsecond a leaf on a CPU.
    """
    compared = [
        (name, leaf, _address(leaf) if again else None, view, view.clone())
        for name, leaf in zip(names, tensors, strict=True)
        if (view := _spread(leaf)) is not None
    ]

    def refuse_if_written() -> None:
        for name, leaf, address, view, value in compared:
            moved = address is not None and _address(leaf) != address
            if moved or not torch.equal(view, value):
                raise RuntimeError(
                    f"{name!r} has been overwritten since this matvec was made, through `.data`, "
                    f"NumPy or in another thread. {_MIXED}"
                )

    return refuse_if_written


def _address(leaf: Tensor) -> int | None:
    """Return the address of the entries of a tensor, None if it has no memory of its own."""
    has_memory = type(leaf).__torch_dispatch__ is Tensor.__torch_dispatch__
    return leaf.data_ptr() if has_memory else None


def _spread(leaf: Tensor) -> Tensor | None:
    """Return a view of a few entries of a tensor as integers, None if it has no readable bits."""
    local = leaf.to_local() if hasattr(leaf, "to_local") else leaf
    if is_functorch_wrapped_tensor(local) or local.device.type == "meta" or local.is_complex():
        return None
    most = max(1, round(_COMPARED ** (1 / max(1, local.dim()))))
    steps = tuple(slice(None, None, max(1, -(-size // most))) for size in local.shape)
    return local.detach()[steps].view(_INTEGERS[local.element_size()])


@dataclass(frozen=True)
class Reads:
    """Tensors that losses read besides the parameters of the matvec, by id, with their names.

    Attributes:
        parameters: Frozen parameters, and parameters that are held fixed.
        buffers: Buffers of modules.
        versions: Version of each tensor when it was first read, by id.
    """

    parameters: Named = field(default_factory=dict)
    buffers: Named = field(default_factory=dict)
    versions: dict[int, int | None] = field(default_factory=dict, compare=False)

    @property
    def all(self) -> Named:
        """Tensors of both kinds."""
        return self.parameters | self.buffers

    def note(self, parameters: Named, buffers: Named) -> None:
        """Add tensors that an evaluation is about to read."""
        self.parameters.update(parameters)
        self.buffers.update(buffers)
        for key, (_, leaf) in (parameters | buffers).items():
            if key not in self.versions:
                self.versions[key] = _version(leaf)

    def unchanged(self, *, again: bool) -> Callable[[], None]:
        """Return a function that raises if what products read has since been changed.

        Args:
            again: Whether products evaluate the loss again, and with it the buffers.
        """
        read = self.all if again else self.parameters
        names, tensors = [name for name, _ in read.values()], [leaf for _, leaf in read.values()]
        versions = [self.versions.get(key, _version(leaf)) for key, (_, leaf) in read.items()]
        in_place = unchanged(names, tensors, versions)
        without_version = unwritten(names, tensors, again=again)

        def refuse_if_changed() -> None:
            in_place()
            without_version()

        return refuse_if_changed


_READS: ContextVar[tuple[Reads, ...]] = ContextVar("reads", default=())


@contextmanager
def reading() -> Iterator[Reads]:
    """Context manager that yields the `Reads` of all losses that are evaluated in it."""
    reads = Reads()
    token = _READS.set((*_READS.get(), reads))
    try:
        yield reads
    finally:
        _READS.reset(token)


def note_read(
    parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]] = (), /
) -> None:
    """Report tensors, with their names, to each `reading` around."""
    # Dynamo cannot trace context variables. None of them is set inside compiled functions.
    if torch.compiler.is_compiling() or not (noted := _READS.get()):
        return
    of_parameters = {id(leaf): (name, leaf) for name, leaf in parameters}
    of_buffers = {id(leaf): (name, leaf) for name, leaf in buffers}
    for reads in noted:
        reads.note(of_parameters, of_buffers)


@dataclass(frozen=True)
class Rereads:
    """Record of the tensors that evaluations read, which must be the same in all of them.

    Attributes:
        checks: Functions that raise if a tensor has changed since its first evaluation, by its id.
    """

    checks: dict[int, Callable[[], None]] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[str], leaves: Sequence[Tensor], /) -> Rereads:
        """Return the record of evaluations at these parameters, before the first of them."""
        named = {id(leaf): (name, leaf) for name, leaf in zip(names, leaves, strict=True)}
        return cls({key: Reads({key: each}).unchanged(again=True) for key, each in named.items()})

    @contextmanager
    def reading(self) -> Iterator[Reads]:
        """Context manager around some evaluations, which yields the tensors that they read.

        Raises:
            RuntimeError: If a tensor has changed since an earlier evaluation, or in between.
        """
        self._refuse_if_changed()
        with reading() as reads:
            yield reads
        # The loader, or another thread, may have written between two evaluations.
        for key, named in reads.all.items():
            if key not in self.checks:
                one = Reads({key: named}, versions=reads.versions)
                self.checks[key] = one.unchanged(again=True)
        self._refuse_if_changed()

    def _refuse_if_changed(self) -> None:
        for check in self.checks.values():
            check()
