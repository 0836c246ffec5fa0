"""Fingerprints of matvecs: exact checksums of the tensors that determine a matrix.

A matvec of this library has an attribute ``fingerprint``. It is a function without arguments that
returns one checksum for each kind of data, such as parameters and batches. Transforms set the
attribute. A run with a checkpoint evaluates it once, at the cost of a pass over the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hessfunc.containers import batch_leaves
from hessfunc.trees import Matvec

Fingerprint: TypeAlias = Mapping[str, str]

# Number of entries of a batch that are hashed at once.
_PIECE = 2**20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def with_fingerprint(matvec: Matvec, made: Callable[[], Fingerprint], /) -> Matvec:
    """Attach a fingerprint to a matvec and return the matvec; ``made`` computes it on demand."""
    vars(matvec)["fingerprint"] = made
    return matvec


def fingerprint(matvec: Matvec, /) -> Fingerprint:
    """Return the checksums of a matvec by kind of data; empty for a matvec without fingerprint."""
    made = getattr(matvec, "fingerprint", None)
    return made() if callable(made) else {}


def combined(matvecs: Sequence[Matvec], /) -> Fingerprint:
    """Return the fingerprint of a matrix that is built from others."""
    parts = [fingerprint(matvec) for matvec in matvecs]
    kinds = dict.fromkeys(kind for part in parts for kind in part)
    return {kind: ", ".join(part.get(kind, "unknown") for part in parts) for kind in kinds}


def checksum(tensors: Iterable[Tensor], /) -> str:
    """Return the checksum of the bytes of tensors; for a DTensor, of its local shard."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(bytes_of(tensor.to_local() if hasattr(tensor, "to_local") else tensor))
    return digest.hexdigest()


def of_batches(batches: Iterable[Any], /) -> str:
    """Return a checksum of all examples that does not depend on their order or batch size."""
    sums = [_of_examples(batch) for batch in batches]
    return " ".join(f"{sum(column) % 2**64:016x}" for column in zip(*sums, strict=True))


def _of_examples(batch: Any) -> tuple[int, int]:
    """Return the sums over examples of h and h^2 modulo 2^64, as exact integers.

    An example is one row of each tensor. Its hash is h = sum_j word_j entry_j, where entry_j are
    the bits of its entries as integers and word_j are odd random words. The sum of h alone would
    not change when two examples exchange their targets; the sum of h^2 does.
    """
    values = batch_leaves(batch)
    tensors = [leaf.detach() for leaf in values if isinstance(leaf, Tensor)]
    counts = [len(tensor) for tensor in tensors if tensor.dim() > 0]
    hashes: Tensor | None = None
    rest = [repr(x).encode() for x in values if isinstance(x, bool | int | float | str)]
    for i, tensor in enumerate(tensors):
        if tensor.dim() > 0 and len(tensor) == counts[0] and tensor.layout == torch.strided:
            of_rows = _of_rows(tensor, i)
            hashes = of_rows if hashes is None else hashes + of_rows.to(hashes.device)
        else:
            rest.append(bytes(bytes_of(tensor)))
    of_rest = int(digest_of(b"".join(rest)), 16) if rest else 0
    if hashes is None:
        return of_rest, of_rest**2
    return int(hashes.sum()) + of_rest, int(hashes.square().sum()) + of_rest**2


def _of_rows(tensor: Tensor, which: int) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    rows = tensor.reshape(len(tensor), -1)
    odd = np.random.PCG64(which).random_raw(rows.shape[1]).view(np.int64) | 1
    factors = torch.from_numpy(odd).to(rows.device)
    few = max(1, _PIECE // max(1, rows.shape[1]))
    pieces = [piece.contiguous().view(_INTEGERS[piece.itemsize]) for piece in rows.split(few)]
    return torch.cat([(piece.to(torch.int64) * factors).sum(1) for piece in pieces])


def digest_of(data: bytes | memoryview, /) -> str:
    """Return a 128-bit checksum of bytes: other bytes share it with probability 2^-128."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def bytes_of(tensor: Tensor, /) -> memoryview:
    """Return the bytes of a tensor."""
    plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return plain.cpu().contiguous().flatten().view(torch.uint8).numpy().data
