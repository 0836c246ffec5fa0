"""Names of the leaves of a tree, and messages about other trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optree
from torch import nn


def names_of(structure: optree.PyTreeSpec, /) -> tuple[str, ...]:
    """Return the dotted path of each leaf, or its keys if dotted paths are ambiguous."""
    paths = structure.paths()
    dotted = [".".join(map(_label, path)) or "params" for path in paths]
    if len(set(dotted)) == len(dotted):
        return tuple(dotted)
    # Dotted paths are ambiguous for the keys 1 and "1", or for "a.b" and "a" followed by "b".
    several = {name for name in dotted if dotted.count(name) > 1}
    return tuple(
        "".join(f"[{key!r}]" for key in path) if name in several else name
        for name, path in zip(dotted, paths, strict=True)
    )


def _label(key: Any) -> str:
    return f"{key[0]}[{key[1]}]" if isinstance(key, tuple) and len(key) == 2 else str(key)


def advice(leaf: object, /) -> str:
    """Return the end of a message: what to pass instead of an object that is not a tensor."""
    if isinstance(leaf, np.ndarray):
        return (
            ": pass torch.from_numpy(array), or `compat.from_numpy(f, n=n)` for a NumPy function f"
        )
    if isinstance(leaf, nn.Module):
        return ": pass the params of `model_fn, params = functional(model)`"
    return ""


def described(names: Sequence[str], /) -> str:
    """Return the number of leaves, and the names of the first ones."""
    shown = ", ".join(names[:4])
    return f"{len(names)} leaves ({shown}{', ...' if len(names) > 4 else ''})"
