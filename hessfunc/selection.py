"""Selection of the leaves of a tree by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from hessfunc.options import validated

# Glob over dotted names, several globs or exact names, or a predicate ``(name, tensor) -> bool``.
Pattern: TypeAlias = str | Iterable[str] | Callable[[str, Tensor], bool]


@validated
def split(
    tree: Mapping[str, Any],
    pattern: Pattern,
    /,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a (nested) mapping of tensors into the chosen leaves and the rest.

    Examples:
        >>> params = {name: torch.zeros(2) for name in ("0.weight", "0.bias", "1.weight")}
        >>> part, rest = hf.split(params, "0.*")
        >>> list(part), list(rest)
        (['0.weight', '0.bias'], ['1.weight'])

    Args:
        tree: Mapping of names to tensors or to further mappings.
        pattern: Glob over dotted names (``"layer3.*"``), several globs or exact names, or a
            predicate ``(name, tensor) -> bool``.

    Returns:
        ``(chosen, rest)``, two nested dicts; `hold` takes the second.

    Raises:
        TypeError: If the tree has containers other than mappings.
        ValueError: If no leaf, or no leaf for one of several patterns, is chosen.
    """
    named = list(_named(tree, (), ()))
    wanted = selected({name: leaf for name, _, leaf in named}, pattern)
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, path, leaf in named:
        _insert(chosen if name in wanted else rest, path, leaf)
    return chosen, rest


def selected(leaves: Mapping[str, Tensor], pattern: Pattern, /) -> set[str]:
    """Return the names of the leaves that a pattern chooses.

    Args:
        leaves: Leaves by their dotted names.
        pattern: Pattern, as in `split`.

    Raises:
        ValueError: If no leaf, or no leaf for one of several patterns, is chosen.
    """
    names = list(leaves)
    unknown: list[str] = []
    if callable(pattern):
        wanted = {name for name, leaf in leaves.items() if pattern(name, leaf)}
    else:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        fitting = {glob: _fitting(glob, names) for glob in patterns}
        wanted = set().union(*fitting.values())
        unknown = [glob for glob, fit in fitting.items() if not fit]
    if not wanted:
        raise ValueError(f"{pattern!r} chooses none of the leaves {first_of(names)}")
    if unknown:
        raise ValueError(f"there is no leaf named {', '.join(unknown)} among {first_of(names)}")
    return wanted


def _named(
    tree: Mapping[str, Any], names: tuple[str, ...], path: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
    """Yield the dotted name, the keys and the tensor of each leaf of a mapping."""
    for key, value in tree.items():
        here, keys = (*names, str(key)), (*path, key)
        if isinstance(value, Mapping):
            yield from _named(value, here, keys)
        elif isinstance(value, Tensor):
            yield ".".join(here), keys, value
        else:
            raise TypeError(
                f"{'.'.join(here)!r} is a {type(value).__name__}, and `split` takes (nested) "
                "mappings of tensors: pass dict(model.named_parameters())"
            )


def _fitting(pattern: str, names: Sequence[str]) -> set[str]:
    # A name may contain brackets, which a glob would read as a set of letters.
    if pattern in names:
        return {pattern}
    return {name for name in names if fnmatch.fnmatchcase(name, pattern)}


def first_of(names: Sequence[str], /) -> str:
    """Return the first eight names as text for a message."""
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Tensor) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def merge(chosen: Mapping[str, Any], rest: Mapping[str, Any], /) -> dict[str, Any]:
    """Merge the two dicts of `split` into one."""
    whole = dict(rest)
    for key, value in chosen.items():
        whole[key] = merge(value, whole[key]) if key in whole else value
    return whole
