"""Compilation of matvecs."""

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

# Relative tolerance between products of the traced program and of the matvec.
_TOLERANCE = 1e-3
# Key of a program, (shape, dtype, device) of each leaf, and the program itself.
_Shapes = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
_Products = Callable[..., Sequence[Tensor]]
# Function that builds a tree from its leaves.
_Nested = Callable[[Iterable[Tensor]], Tree]


class NotCompiledWarning(UserWarning):
    """Warning that a matvec could not be compiled and runs uncompiled."""


@options.validated(chunk_size=options.whole_number)
def compiled(
    matvec: Matvec, /, *, chunk_size: int = 1, backend: str | Callable[..., Any] = "inductor"
) -> Matvec:
    """Return a matvec with compiled products, for thousands of products on a large net.

    The operations of a product are traced once, with the tensors that the matvec keeps as
    constants. Compilation then fuses elementwise operations and removes copies and views. Each
    shape of a chunk is compiled separately; larger blocks are multiplied in chunks.

    Compilation takes half a minute or more. It pays off after

        seconds of compilation / (seconds of a product - seconds of a compiled product)

    products, which is thousands on a CPU; see the tables in `bench/results/speed`. Some products
    cannot be compiled, for instance if they read the data each time (`over_batches` without
    ``keep``). They run uncompiled, and a `NotCompiledWarning` gives the reason.

    Args:
        matvec: Matvec with fixed parameters and data.
        chunk_size: Largest number of vectors that one program multiplies. 1 compiles fastest.
        backend: Backend of `torch.compile`.

    Raises:
        ValueError: If the chunk size is not positive.
        RuntimeError: If params have changed in place since ``matvec`` was made; raised by the
            returned matvec.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: it must be at least 1")
    programs: dict[_Shapes, _Products] = {}
    checks: list[Callable[[], None]] = []

    def of_chunk(leaves: Sequence[Tensor], nested: _Nested) -> Sequence[Tensor]:
        key = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        if key not in programs:
            programs[key] = _program(matvec, leaves, nested, backend, checks)
        return programs[key](*leaves)

    def products(block: Tree) -> Tree:
        for check in checks:
            check()
        entries, structure = flatten(block)
        pieces = zip(*(leaf.split(chunk_size) for leaf in entries), strict=True)
        parts = [of_chunk(piece, structure.unflatten) for piece in pieces]
        if len(parts) == 1:
            return structure.unflatten(parts[0])
        return structure.unflatten(torch.cat(leaves) for leaves in zip(*parts, strict=True))

    return with_fingerprint(products, lambda: fingerprint(matvec))


def _program(
    matvec: Matvec,
    tensors: Sequence[Tensor],
    nested: _Nested,
    backend: str | Callable[..., Any],
    checks: list[Callable[[], None]],
) -> _Products:
    def of_leaves(*leaves: Tensor) -> list[Tensor]:
        return flatten(matvec(nested(leaves)))[0]

    # The first product of a shape also measures its operations, which must not be traced.
    of_leaves(*tensors)
    try:
        with torch.no_grad(), guarding(checks), as_operations():
            traced = make_fx(of_leaves, tracing_mode="real")(*tensors)
        for name, constant in list(traced.named_buffers()):
            setattr(traced, name, constant.detach())
        traced.graph.eliminate_dead_code()
        traced.recompile()
        # Tracing turns values computed outside of torch into constants. Another block shows them.
        other = [
            torch.linspace(-1, 1, t.numel(), dtype=torch.float64, device=t.device).to(t).view_as(t)
            for t in tensors
        ]
        _refuse_another(_precisely(traced)(*other), of_leaves(*other))
        program = _precisely(torch.compile(traced, fullgraph=True, dynamic=False, backend=backend))
        program(*tensors)
    except Exception as error:  # The matvec itself works even if torch.compile fails.
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"the product cannot be compiled and runs uncompiled: {reason}",
            NotCompiledWarning,
            stacklevel=4,
        )
        return of_leaves
    return program


def _precisely(program: _Products) -> _Products:
    def run(*tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), precise(tensors[0].device):
            return program(*tensors)

    return run


def _refuse_another(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    pairs = list(zip(tensors, expected, strict=True))
    error = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.double().square().sum()) for _, b in pairs))
    if not error <= _TOLERANCE * size:
        raise ValueError(
            f"products of the traced program, of length {size:.1e}, are off by {error:.1e}, as if "
            "the matvec leaves torch, for NumPy or Python numbers: compute in torch only"
        )
