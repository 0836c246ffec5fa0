"""Random numbers as functions of a key and a position: no stream, no state.

Bits come from SplitMix64 (Steele, Lea and Flood 2014) by position, so they are the same on every
device, in any order and in any part.
"""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor

from hessfunc.precision import wide_dtype

__all__ = ["mixed", "normals", "of_matrix", "signs", "uniforms"]

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mixed(*numbers: int) -> int:
    """One 64-bit key of several integers: SplitMix64's finaliser, absorbing one after another."""
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def of_matrix(seed: int | None, /) -> int:
    """The seed of a random matrix, or a fresh one.

    Raises:
        ValueError: none was given, and the other processes of torch.distributed would draw others.
    """
    if seed is not None:
        return seed
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "without a seed every rank would draw one of its own, and multiply another matrix: "
            "pass the same `seed=` on all"
        )
    return secrets.randbits(63)


def signs(key: int, places: range, device: torch.device, /) -> Tensor:
    """+1 or -1 at these places of an endless sequence, int8."""
    first = places.start // 64
    octets = _words(key, range(first, -(-places.stop // 64)), device).view(torch.uint8)
    within = torch.arange(8, dtype=torch.uint8, device=device)
    bits = (octets[:, None] >> within).bitwise_and_(1).flatten()
    bits = bits[places.start - 64 * first : places.stop - 64 * first]
    return bits.to(torch.int8).mul_(2).sub_(1)


def normals(key: int, places: range, device: torch.device, /) -> Tensor:
    """Standard normals at these places of an endless sequence, float64 where the device has it.

    Box and Muller 1958: each word gives two 32-bit uniforms, and they two normals.
    """
    wide = wide_dtype(device)
    first = places.start // 2
    words = _words(key, range(first, -(-places.stop // 2)), device)
    radius = _shifted(words, 32).to(wide).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_((1 << 32) - 1).to(wide).mul_(2 * math.pi * 2.0**-32)
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten()
    return both[places.start - 2 * first : places.stop - 2 * first]


def uniforms(count: int, /, *key: int, device: torch.device) -> Tensor:
    """Numbers of (0, 1), float64 where the device has it: a function of the key alone."""
    words = _shifted(_words(mixed(*key), range(count), device), 12)
    return words.to(wide_dtype(device)).add_(0.5).mul_(2.0**-52)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _words(key: int, places: range, device: torch.device) -> Tensor:
    """The 64-bit words of a key at these places."""
    words = torch.arange(places.start + 1, places.stop + 1, dtype=torch.int64, device=device)
    words.mul_(_signed(_GOLDEN)).add_(_signed(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, by: int) -> Tensor:
    # The shift of int64 is arithmetic: the copies of the sign bit are masked off.
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)
