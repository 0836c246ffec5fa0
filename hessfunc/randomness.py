"""Counter-based random numbers: functions of a key and a position, without a stream or a state.

The bits are those of SplitMix64 (Steele, Lea and Flood 2014) at a position. They are the same on
every device, in any order, and whether the numbers are drawn together or in parts.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from hessfunc.numerics import wide_dtype

# Function (keys, places, device) -> random numbers.
Draw: TypeAlias = Callable[[Tensor, Sequence[range], torch.device], Tensor]

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mixed(*numbers: int) -> int:
    """Hash several integers to a 64-bit key with SplitMix64's finaliser, one after another."""
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def of_matrix(seed: int | None, /) -> int:
    """Return the seed of a random matrix, or a fresh one for None.

    Raises:
        ValueError: If the seed is None and torch.distributed has several processes, which would
            draw different seeds.
    """
    if seed is not None:
        return seed
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "seed=None would give each rank a different random matrix: pass the same seed on all "
            "ranks, for instance `seed=0`"
        )
    return secrets.randbits(63)


def keys(seed: int, indices: Sequence[int], leaves: range, device: torch.device, /) -> Tensor:
    """Return the keys ``mixed(seed, index, leaf)``, an int64 tensor ``(indices, leaves)``."""
    # The last step of `mixed` is one finaliser of state + leaf + _GOLDEN, here on the device.
    states = [_signed((mixed(seed, index) + _GOLDEN) & _WORD) for index in indices]
    rows = torch.tensor(states, dtype=torch.int64, device=device)[:, None]
    return _finalised(rows + torch.arange(leaves.start, leaves.stop, device=device))


def signs(keys: Tensor, places: Sequence[range], device: torch.device, /) -> Tensor:
    """Return random signs at given places of the infinite sequences of some keys.

    Args:
        keys: Keys ``(k, l)``.
        places: Range of places for each of the l columns of keys.
        device: Device of the result.

    Returns:
        Entries +1 and -1, int8 ``(k, total number of places)``, the columns one after another.
    """
    words, chosen = _chosen(keys, places, 64, device)
    octets = words.view(torch.uint8)
    within = torch.arange(8, dtype=torch.uint8, device=device)
    bits = (octets[:, :, None] >> within).bitwise_and_(1).flatten(1)
    return bits[:, chosen].view(torch.int8).mul_(2).sub_(1)


def normals(keys: Tensor, places: Sequence[range], device: torch.device, /) -> Tensor:
    """Return standard normal numbers at given places of the infinite sequences of some keys.

    Box and Muller 1958: each 64-bit word gives two 32-bit uniform numbers, and these give two
    normal numbers. The arguments and the shape are those of `signs`; the dtype is float64 where
    the device has it.
    """
    # With uniforms u, v in (0, 1): sqrt(-2 log u) cos(2 pi v) and sqrt(-2 log u) sin(2 pi v).
    wide = wide_dtype(device)
    words, chosen = _chosen(keys, places, 2, device)
    radius = _shifted(words, 32).to(wide).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_((1 << 32) - 1).to(wide).mul_(2 * math.pi * 2.0**-32)
    del words
    both = torch.empty(*radius.shape, 2, dtype=wide, device=device)
    torch.mul(radius, angle.cos(), out=both[..., 0])
    torch.mul(radius, angle.sin_(), out=both[..., 1])
    return both.flatten(1)[:, chosen]


def fill(
    rows: Tensor,
    spans: Sequence[range],
    of: Draw,
    keys: Callable[[range], Tensor],
    scratch: int,
    /,
) -> None:
    """Fill rows with random numbers, in pieces that fit in the cache; small leaves share a piece.

    Args:
        rows: Rows ``(k, n)`` to fill.
        spans: Range of places of each leaf, n places in all.
        of: Function of keys, places and a device, such as `signs`.
        keys: Function that returns the keys ``(k, leaves)`` of a range of leaves.
        scratch: Number of entries of a piece.
    """
    begin = 0
    for leaves, places in _grouped(spans, max(1, scratch // len(rows))):
        end = begin + sum(map(len, places))
        of_rows = [slice(0, len(rows))]
        if (end - begin) * len(rows) > scratch:
            of_rows = [slice(i, i + 1) for i in range(len(rows))]
        of_leaves = keys(leaves)
        for some in of_rows:
            rows[some, begin:end] = of(of_leaves[some], places, rows.device)
        begin = end


def _grouped(spans: Sequence[range], most: int) -> Iterator[tuple[range, list[range]]]:
    """Yield ranges of leaves with their places, or pieces of one leaf, up to ``most`` entries."""
    # Each word of random bits gives 64 signs.
    most = max(64, most // 64 * 64)
    begin, places, total = 0, list[range](), 0
    for i, span in enumerate(spans):
        if places and total + len(span) > most:
            yield range(begin, i), places
            begin, places, total = i, [], 0
        if len(span) > most:
            cuts = [*range(span.start, span.stop, most), span.stop]
            for start, stop in pairwise(cuts):
                yield range(i, i + 1), [range(start, stop)]
            begin = i + 1
        else:
            places.append(span)
            total += len(span)
    if places:
        yield range(begin, len(spans)), places


def uniforms(count: int, /, *key: int, device: torch.device) -> Tensor:
    """Return uniform numbers in (0, 1) that depend only on the key.

    The dtype is float64 where the device has it.
    """
    # The upper 52 bits of each word give (bits + 1/2) / 2^52, which is never 0 or 1.
    words = _shifted(_words(mixed(*key), range(count), device), 12)
    return words.to(wide_dtype(device)).add_(0.5).mul_(2.0**-52)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _words(key: int, places: range, device: torch.device) -> Tensor:
    """Return the 64-bit words of a key at these places."""
    # Word i of SplitMix64 is the finaliser of key + (i + 1) * golden.
    words = torch.arange(places.start + 1, places.stop + 1, dtype=torch.int64, device=device)
    return _finalised(words.mul_(_signed(_GOLDEN)).add_(_signed(key)))


def _chosen(
    keys: Tensor, places: Sequence[range], entries: int, device: torch.device
) -> tuple[Tensor, slice | Tensor]:
    """Return the words that cover the given places, and the index of the places among them.

    Args:
        keys: Keys ``(k, l)``.
        places: Range of places for each of the l columns of keys.
        entries: Number of entries that each word gives.
        device: Device of the words.

    Returns:
        Words ``(k, w)``, and the index of the places among the ``w * entries`` entries.
    """
    # Column c needs words firsts[c], ..., firsts[c] + counts[c] - 1. They are concatenated over
    # columns; `shifts` maps a concatenated position to its word, `offsets` a place to its entry.
    firsts = [part.start // entries for part in places]
    counts = [
        -(-part.stop // entries) - a if part else 0 for part, a in zip(places, firsts, strict=True)
    ]
    if len(places) == 1:
        positions = torch.arange(firsts[0] + 1, firsts[0] + counts[0] + 1, device=device)
        begin = places[0].start - entries * firsts[0]
        chosen: slice | Tensor = slice(begin, begin + len(places[0]))
        words = keys.expand(-1, counts[0])
    else:
        lengths = list(map(len, places))
        before = list(accumulate(counts, initial=0))[:-1]
        at = list(accumulate(lengths, initial=0))[:-1]
        shifts = [a - b for a, b in zip(firsts, before, strict=True)]
        offsets = [
            entries * (b - a) + part.start - c
            for part, a, b, c in zip(places, firsts, before, at, strict=True)
        ]
        table = torch.tensor([counts, lengths, shifts, offsets], dtype=torch.int64, device=device)
        positions = torch.arange(1, sum(counts) + 1, device=device)
        positions += table[2].repeat_interleave(table[0], output_size=sum(counts))
        chosen = torch.arange(sum(lengths), device=device)
        chosen += table[3].repeat_interleave(table[1], output_size=sum(lengths))
        words = keys.repeat_interleave(table[0], dim=1, output_size=sum(counts))
    return _finalised(words + positions * _signed(_GOLDEN)), chosen


def _finalised(words: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, by: int) -> Tensor:
    # The shift of int64 is arithmetic, so the copies of the sign bit are masked off.
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)


@contextmanager
def seeded(seed: int, device: torch.device | None = None, /) -> Iterator[None]:
    """Context in which torch's random streams start at a seed; they are restored at the end.

    Args:
        seed: Seed of the streams.
        device: Device whose stream is seeded besides that of the CPU, if it is a CUDA device.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    with torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
        # torch.manual_seed would also seed devices whose streams are not restored.
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield
