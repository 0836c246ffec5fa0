"""Count the floating-point operations of a training."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hessfunc.containers import batch_leaves

Found = TypeVar("Found")
# Floating-point operations divided by the cube of the order (Golub and Van Loan 2013).
_DECOMPOSITIONS: dict[Any, float] = {
    torch.ops.aten._linalg_eigh: 9,
    torch.ops.aten._linalg_svd: 21,
    torch.ops.aten.linalg_cholesky_ex: 1 / 3,
    torch.ops.aten.linalg_inv_ex: 2,
    torch.ops.aten._linalg_solve_ex: 2 / 3,
}

# Matrix product by oneDNN, which only some builds have and which torch's registry does not list.
_ONE_DNN = "mkldnn::_linear_pointwise"


class CountedFlops(TorchDispatchMode):
    """Count the floating-point operations of matrix products, convolutions and decompositions.

    Products and convolutions are counted as in ``torch.utils.flop_counter.FlopCounterMode``, but
    without the statistics of each module, which take most of its time. Elementwise functions are
    not counted.

    Attributes:
        total: Number of operations so far.
    """

    def __init__(self) -> None:
        # Imported here, because the import takes a fifth of a second.
        from torch.utils.flop_counter import flop_registry

        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._counts = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = self._counts.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out)
        elif func._overloadpacket in _DECOMPOSITIONS:
            self.total += _of_decomposition(func._overloadpacket, args[0])
        elif func.name() == _ONE_DNN:
            self.total += 2 * args[0].numel() * len(args[1])
        return out


def _of_decomposition(function: Any, matrices: Tensor) -> int:
    rows, columns = matrices.shape[-2:]
    # For a rectangular matrix, the count is linear in the longer side: c max(m, n) min(m, n)^2.
    return round(_DECOMPOSITIONS[function] * matrices.numel() * min(rows, columns))


@dataclass
class Metered:
    """Blocks ``(params, batch) -> {name: block}`` whose floating-point operations are counted.

    A dispatch mode slows small products down. Each kind of work (the blocks of a batch, a lookup, a
    product) is therefore counted only twice. The second count is used from then on, because the
    first run may include checks or timings.

    Attributes:
        blocks: Function whose blocks are counted.
        total: Number of operations so far.
        by_kind: Counts of each kind of work, at most two.
    """

    blocks: Callable[[Mapping[str, Tensor], Any], Mapping[str, Any]]
    total: int = 0
    by_kind: dict[Hashable, list[int]] = field(default_factory=dict)

    def __call__(self, params: Mapping[str, Tensor], batch: Any, /) -> Mapping[str, Any]:
        shapes = tuple(x.shape for x in batch_leaves(batch) if isinstance(x, Tensor))
        made = self.counted(("blocks", shapes), lambda: self.blocks(params, batch))
        return _MeteredBlocks(self, made, shapes)

    def counted(self, kind: Hashable, run: Callable[[], Found], /) -> Found:
        """Run a function, add its operations to the total, and return its result."""
        counts = self.by_kind.setdefault(kind, [])
        if len(counts) == 2:
            self.total += counts[-1]
            return run()
        with CountedFlops() as flops:
            result = run()
        counts.append(flops.total)
        self.total += flops.total
        return result


@dataclass(frozen=True)
class _MeteredBlocks(Mapping[str, Any]):
    meter: Metered
    blocks: Mapping[str, Any]
    shapes: Hashable

    def __getitem__(self, name: str) -> _MeteredBlock:
        kind = (name, self.shapes)
        block = self.meter.counted(("lookup", kind), lambda: self.blocks[name])
        return _MeteredBlock(self.meter, block, kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class _MeteredBlock:
    meter: Metered
    block: Any
    kind: Hashable

    def matvec(self, vectors: Tensor, /) -> Tensor:
        product = getattr(self.block, "matvec", self.block)
        return self.meter.counted(("product", len(vectors), self.kind), lambda: product(vectors))

    @property
    def inverse_matvec(self) -> Callable[[Tensor, float], Tensor]:
        # Raises AttributeError if the block has no inverse, so that `getattr` returns its default.
        inverse = self.block.inverse_matvec
        return lambda vectors, damping: self.meter.counted(
            ("inverse", len(vectors), self.kind), lambda: inverse(vectors, damping)
        )
