"""Forms of the blocks of parameters, and the names of the factors that they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hessfunc.kronecker.linear_maps import Layout
from hessfunc.kronecker.moments import nearest_product

# Beginnings of the names of factors.
LEFT, RIGHT = "output factor of ", "input factor of "


@dataclass(frozen=True)
class Form:
    """Structure of the block of one parameter.

    Attributes:
        kind: Structure.
        shape: Shape of the parameter.
        layout: Order of its weights; None for a diagonal.
        site: Name of the first parameter with the same outputs, whose output factor it shares.
        bias: Name of the bias in the same block; None without one.
    """

    kind: Literal["kronecker", "dense", "diagonal", "joint bias"]
    shape: torch.Size
    layout: Layout | None = None
    site: str = ""
    bias: str | None = None


def factor_keys(forms: Mapping[str, Form], /) -> dict[str, tuple[str, str]]:
    """Return the names of the two factors of each parameter that has them."""
    return {
        name: (LEFT + form.site, RIGHT + name)
        for name, form in forms.items()
        if form.kind == "kronecker"
    }


# Suffixes of the factors of calls that multiply by a matrix, and of those by its transpose.
WAYS = "", ", transposed"


def both_ways(factors: Mapping[str, Tensor], /) -> dict[str, Tensor]:
    """Return factors of which those of both ways are replaced by the product nearest to the sum.

    The block of a matrix with the factors B_1 and A_1, whose transpose has B_2 and A_2, is
    approximately ``B_1 (x) A_1 + A_2 (x) B_2``.
    """
    made = {key: factor for key, factor in factors.items() if not key.endswith(WAYS[1])}
    for key in factors.keys() - made.keys():
        if key.startswith(RIGHT):
            name = key.removeprefix(RIGHT).removesuffix(WAYS[1])
            left, right = LEFT + name, RIGHT + name
            b, a = (factors.get(left + way) for way in WAYS), [factors[right + way] for way in WAYS]
            # Forward-only factors have identity matrices B, as large as the A of the other way.
            one, two = (
                torch.ones_like(other[:, 0] if other.dim() == 3 else other) if own is None else own
                for own, other in zip(b, reversed(a), strict=True)
            )
            made[left], made[right] = nearest_product([one, a[1]], [a[0], two])
    return made


def is_factor(key: str, /) -> bool:
    """Return whether a statistic is a factor, by its name."""
    return key.startswith((LEFT, RIGHT))
