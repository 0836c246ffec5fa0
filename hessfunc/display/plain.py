"""Values as plain Python, which JSON can write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessfunc.trees import flatten, whole


def plain(value: Any, /, *, vectors: bool = True) -> Any:
    """Return a value as numbers, text, None, lists and dicts.

    Args:
        value: Value of any type: a number, a tensor, a tree, or an object with ``to_dict``.
        vectors: Whether nested results include trees with the structure of the parameters.
    """
    match value:
        case None | bool() | str():
            return value
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            # Subclasses of float lose what they add to the number.
            return float(value)
        case Tensor():
            return whole(value).detach().cpu().tolist()
        case np.ndarray():
            return value.tolist()
        case torch.dtype() | torch.device():
            return str(value)
        case Mapping():
            return {str(key): plain(item, vectors=vectors) for key, item in value.items()}
    if hasattr(value, "to_dict"):
        return value.to_dict(vectors=vectors)
    match value:
        case list() | tuple() | set() | frozenset():
            return [plain(item, vectors=vectors) for item in value]
        case _ if is_dataclass(value):
            return {
                item.name: plain(getattr(value, item.name), vectors=vectors)
                for item in fields(value)
            }
    parts, structure = flatten(value)
    if len(parts) == 1 and parts[0] is value:
        return repr(value)
    # Another container that is registered as a pytree: its leaves by their path.
    return {
        ".".join(map(str, path)): plain(part, vectors=vectors)
        for path, part in zip(structure.paths(), parts, strict=True)
    }
