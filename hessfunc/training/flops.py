"""What a training computes, in floating-point operations, and what it holds in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hessfunc.containers import batch_leaves

Found = TypeVar("Found")
# Floating-point operations over the cube of the order, by Golub and Van Loan 2013.
_DECOMPOSITIONS: dict[Any, float] = {
    torch.ops.aten._linalg_eigh: 9,
    torch.ops.aten._linalg_svd: 21,
    torch.ops.aten.linalg_cholesky_ex: 1 / 3,
    torch.ops.aten.linalg_inv_ex: 2,
    torch.ops.aten._linalg_solve_ex: 2 / 3,
}

# A product of matrices by oneDNN, which torch's registry does not know; not all builds have it.
_ONE_DNN = "mkldnn::_linear_pointwise"


class CountedFlops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and decompositions.

    Products and convolutions as ``torch.utils.flop_counter.FlopCounterMode``, but without a share
    for each module, which takes most of its time. Elementwise functions do not count.

    Attributes:
        total: the operations so far.
    """

    def __init__(self) -> None:
        # It takes a fifth of a second to import.
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
    # That of a rectangular matrix is linear in the longer side.
    return round(_DECOMPOSITIONS[function] * matrices.numel() * min(rows, columns))


@dataclass
class Metered:
    """Blocks ``(params, batch) -> {name: block}`` that count their floating-point operations.

    A dispatch mode would slow small products down; so it counts each kind of work (the blocks of a
    batch, a lookup, a product) twice, and what it has found the second time is taken for all
    later ones: the first may verify or time something.

    Attributes:
        blocks: what is counted.
        total: the operations so far.
        found: those of each kind of work, one or two times counted.
    """

    blocks: Callable[[Mapping[str, Tensor], Any], Mapping[str, Any]]
    total: int = 0
    found: dict[Hashable, list[int]] = field(default_factory=dict)

    def __call__(self, params: Mapping[str, Tensor], batch: Any, /) -> Mapping[str, Any]:
        shapes = tuple(x.shape for x in batch_leaves(batch) if isinstance(x, Tensor))
        made = self.counted(("blocks", shapes), lambda: self.blocks(params, batch))
        return _MeteredBlocks(self, made, shapes)

    def counted(self, kind: Hashable, run: Callable[[], Found], /) -> Found:
        """The result of some work, whose operations are added."""
        seen = self.found.setdefault(kind, [])
        if len(seen) == 2:
            self.total += seen[-1]
            return run()
        with CountedFlops() as flops:
            result = run()
        seen.append(flops.total)
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
        # Missing where the block has none.
        inverse = self.block.inverse_matvec
        return lambda vectors, damping: self.meter.counted(
            ("inverse", len(vectors), self.kind), lambda: inverse(vectors, damping)
        )
