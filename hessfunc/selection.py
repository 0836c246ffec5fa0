"""Selection of the leaves of a tree by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from hessfunc.options import validated


@validated
def split(
    tree: Mapping[str, Any],
    pattern: str | Iterable[str] | Callable[[str, Tensor], bool],
    /,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen leaves of a (nested) mapping, and the rest.

    Args:
        tree: a mapping of names to tensors, or to further mappings.
        pattern: a glob over dotted names (``"layer3.*"``), several of them or of exact names, or a
            predicate ``(name, tensor) -> bool``.

    Raises:
        TypeError: the tree has containers other than mappings.
        ValueError: nothing, or nothing by one of several patterns, is found.
    """
    found = list(_named(tree, (), ()))
    names = [name for name, _, _ in found]
    unknown: list[str] = []
    if callable(pattern):
        wanted = {name for name, _, leaf in found if pattern(name, leaf)}
    else:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        fitting = {one: _fitting(one, names) for one in patterns}
        wanted = set().union(*fitting.values())
        unknown = [one for one, fit in fitting.items() if not fit]
    if not wanted:
        raise ValueError(f"{pattern!r} chooses none of the leaves {first_of(names)}")
    if unknown:
        raise ValueError(f"there is no leaf named {', '.join(unknown)} among {first_of(names)}")
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, path, leaf in found:
        _insert(chosen if name in wanted else rest, path, leaf)
    return chosen, rest


def _named(
    tree: Mapping[str, Any], names: tuple[str, ...], path: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
    """The dotted name, the keys and the tensor of each leaf of a mapping."""
    for key, value in tree.items():
        here, keys = (*names, str(key)), (*path, key)
        if isinstance(value, Mapping):
            yield from _named(value, here, keys)
        elif isinstance(value, Tensor):
            yield ".".join(here), keys, value
        else:
            raise TypeError(
                f"{'.'.join(here)!r} is a {type(value).__name__}: `split` takes tensors in "
                "(nested) mappings"
            )


def _fitting(pattern: str, names: Sequence[str]) -> set[str]:
    # A name may have brackets, which a glob takes for a set of letters.
    if pattern in names:
        return {pattern}
    return {name for name in names if fnmatch.fnmatchcase(name, pattern)}


def first_of(names: Sequence[str], /) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Tensor) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def merge(chosen: Mapping[str, Any], rest: Mapping[str, Any], /) -> dict[str, Any]:
    """The whole of what `split` has cut in two."""
    whole = dict(rest)
    for key, value in chosen.items():
        whole[key] = merge(value, whole[key]) if key in whole else value
    return whole
