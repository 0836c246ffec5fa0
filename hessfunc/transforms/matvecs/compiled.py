"""A matvec, compiled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hessfunc import options
from hessfunc.autograd import precise
from hessfunc.autograd.matrices import as_operations
from hessfunc.fingerprints import fingerprint, with_fingerprint
from hessfunc.transforms.chunks import guarding
from hessfunc.trees import Matvec, Tree, flatten

# Of products as they were written down, to those of the matvec.
_TOLERANCE = 1e-3
# Of leaves, (shape, dtype, device); and the products of such a block.
_Shapes = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
_Products = Callable[..., Sequence[Tensor]]
# The tree of leaves.
_Nested = Callable[[Iterable[Tensor]], Tree]


class NotCompiledWarning(UserWarning):
    """A matvec could not be compiled, and runs as it is."""


@options.validated(chunk_size=options.whole_number)
def compiled(
    matvec: Matvec, /, *, chunk_size: int = 1, backend: str | Callable[..., Any] = "inductor"
) -> Matvec:
    """The same matrix, with its products compiled: for thousands of them on a large net.

    The operations of a product are written down once, with what they keep of the loss as
    constants, and the whole is compiled: element-wise operations become one, copies and views go.
    There is one compilation for each shape of a chunk: larger blocks go through it in pieces.

    Compiling takes half a minute and more, and pays after

        seconds of compilation / (seconds of a product - seconds of a compiled one)

    products: thousands on a CPU, as the tables in `bench/results/speed` say. A product that cannot
    be compiled, such as one that reads its data each time (`over_batches` without ``keep``), runs
    as it is, and a `NotCompiledWarning` says why.

    Args:
        matvec: block -> block, of parameters and data that are fixed.
        chunk_size: the most vectors that one program multiplies; one is compiled fastest.
        backend: of `torch.compile`.

    Raises:
        ValueError: the chunk size is not positive.
        RuntimeError: (from the matvec) params have changed in place since it was made.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: at least 1")
    programs: dict[_Shapes, _Products] = {}
    checks: list[Callable[[], None]] = []

    def of_chunk(found: Sequence[Tensor], nested: _Nested) -> Sequence[Tensor]:
        key = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in found)
        if key not in programs:
            programs[key] = _program(matvec, found, nested, backend, checks)
        return programs[key](*found)

    def products(block: Tree) -> Tree:
        for check in checks:
            check()
        found, structure = flatten(block)
        pieces = zip(*(leaf.split(chunk_size) for leaf in found), strict=True)
        parts = [of_chunk(piece, structure.unflatten) for piece in pieces]
        if len(parts) == 1:
            return structure.unflatten(parts[0])
        return structure.unflatten(torch.cat(leaves) for leaves in zip(*parts, strict=True))

    return with_fingerprint(products, lambda: fingerprint(matvec))


def _program(
    matvec: Matvec,
    found: Sequence[Tensor],
    nested: _Nested,
    backend: str | Callable[..., Any],
    checks: list[Callable[[], None]],
) -> _Products:
    def of_leaves(*leaves: Tensor) -> list[Tensor]:
        return flatten(matvec(nested(leaves)))[0]

    # The first product of a shape also measures its operations, which is no part of the program.
    of_leaves(*found)
    try:
        with torch.no_grad(), guarding(checks), as_operations():
            written = make_fx(of_leaves, tracing_mode="real")(*found)
        for name, constant in list(written.named_buffers()):
            setattr(written, name, constant.detach())
        written.graph.eliminate_dead_code()
        written.recompile()
        # What was not done by torch stands in the program as the first block found it.
        other = [torch.linspace(-1, 1, t.numel()).to(t).view_as(t) for t in found]
        _refuse_another(_precisely(written)(*other), of_leaves(*other))
        program = _precisely(torch.compile(written, fullgraph=True, dynamic=False, backend=backend))
        program(*found)
    except Exception as error:  # Whatever torch.compile cannot do, the matvec itself can.
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"the product is not compiled, and runs as it is: {reason}",
            NotCompiledWarning,
            stacklevel=4,
        )
        return of_leaves
    return program


def _precisely(program: _Products) -> _Products:
    def run(*found: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), precise(found[0].device):
            return program(*found)

    return run


def _refuse_another(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    pairs = list(zip(found, expected, strict=True))
    error = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.double().square().sum()) for _, b in pairs))
    if not error <= _TOLERANCE * size:
        raise ValueError(
            f"products as they were written down, of length {size:.1e}, are off by {error:.1e}: "
            "does the matvec leave torch, by way of NumPy or of Python's numbers?"
        )
