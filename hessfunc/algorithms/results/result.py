"""What every result tells, and how it is saved and loaded without pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from optree import MappingEntry, PyTreeAccessor, PyTreeEntry, PyTreeSpec
from torch import Tensor

from hessfunc.files import write_whole
from hessfunc.options import path as as_path
from hessfunc.options import validated
from hessfunc.trees import Tree, flatten, leaves


@cache
def versions() -> dict[str, str]:
    """The versions under which results are made."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": torch.__version__, "numpy": np.__version__}
    try:
        found["hessfunc"] = version("hessfunc")
    except PackageNotFoundError:
        found["hessfunc"] = "not installed"
    return found


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What every result tells.

    Attributes:
        matvecs: products with one vector that were spent.
        passes: calls of the matvec; each serves a whole block.
        reason: why the run stopped, in words.
        seed: with which the run can be repeated.
        versions: of the packages that made it.
    """

    matvecs: int
    passes: int
    reason: str
    seed: int | None
    versions: dict[str, str] = field(default_factory=versions)

    kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Result.kinds[cls.__name__] = cls

    def __repr__(self) -> str:
        """What one asks first; vectors and samples stay in their fields."""
        said = {**self._headline(), "matvecs": self.matvecs, "reason": repr(self.reason)}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in said.items())})"

    def _headline(self) -> dict[str, object]:
        """Names and values that stand first, as they are shown."""
        return {}

    def save(self, path: str | os.PathLike[str], /) -> None:
        """Write to one ``.npz`` file, whole or not at all; `load` reads it without pickle.

        Trees are read back as (nested) dicts, with the keys of dicts that are strings or whole
        numbers, and strings for all others.

        Raises:
            TypeError: The path is no path.
            ValueError: The file cannot be written there, or two keys of a tree have one name.
        """
        target = Path(as_path("path", path))
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        plain = _plain(self, "", arrays)
        arrays["result"] = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
        try:
            write_whole(target, lambda file: np.savez(file, allow_pickle=False, **arrays))
        except OSError as error:
            raise ValueError(
                f"{target} cannot be written ({error.strerror}): pass the path of a file in a "
                "directory that exists, such as 'result.npz'"
            ) from None


def array(tensor: Tensor, /) -> np.ndarray[Any, Any]:
    """A tensor as a NumPy array; bfloat16, which NumPy does not know, becomes float32."""
    known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return known.detach().cpu().numpy()


def shown(numbers: Tensor, digits: int = 6) -> str:
    """The first ten numbers of a vector, as text."""
    first = [f"{x:.{digits}g}" for x in numbers[:10].tolist()]
    return f"[{', '.join([*first, '...'] if len(numbers) > 10 else first)}]"


def _plain(result: Result, prefix: str, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """All of a result but its tensors, which go into ``arrays``."""
    plain: dict[str, Any] = {"kind": type(result).__name__}
    for item in dataclasses.fields(result):
        value, key = getattr(result, item.name), prefix + item.name
        if isinstance(value, Result):
            plain[item.name] = {"result": _plain(value, f"{key}/", arrays)}
        elif isinstance(value, Tensor) or _is_tree(value):
            found, structure = flatten(value)
            plain[item.name] = {"paths": _paths(item.name, structure)}
            for i, leaf in enumerate(found):
                arrays[f"{key}/{i}"] = array(leaf)
        elif isinstance(value, tuple):
            plain[item.name] = {"tuple": value}
        else:
            plain[item.name] = {"value": value}
    return plain


def _paths(name: str, structure: PyTreeSpec) -> list[list[str | int]]:
    """The keys that lead to each leaf of a tree: whole numbers of dicts, and strings."""
    paths = [[_key(entry) for entry in accessor] for accessor in structure.accessors()]
    seen: dict[tuple[str | int, ...], PyTreeAccessor] = {}
    for path, accessor in zip(map(tuple, paths), structure.accessors(), strict=True):
        if path in seen:
            raise ValueError(
                f"{accessor.codify(name)} and {seen[path].codify(name)} would have one name in the "
                "file: take strings or whole numbers as the keys of the parameters"
            )
        seen[path] = accessor
    return paths


def _key(entry: PyTreeEntry) -> str | int:
    key = entry.entry
    whole = isinstance(key, int | np.integer) and not isinstance(key, bool)
    return int(key) if whole and isinstance(entry, MappingEntry) else str(key)


def _is_tree(value: Any) -> bool:
    found = leaves(value)
    return bool(found) and all(isinstance(leaf, Tensor) for leaf in found)


@validated
def load(path: str | os.PathLike[str], /) -> Result:
    """A result that was written by ``save``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no result, or is damaged.
    """
    name = os.fspath(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return _restored(json.loads(file["result"].tobytes()), "", file)
    except _UnknownKindError as kind:
        raise ValueError(
            f"{name} holds a result of kind {kind.args[0]!r}, which this version of hessfunc does "
            "not know: load it with the version that wrote it"
        ) from None
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
        raise _MissingFileError(f"there is no file {name}: pass the path given to save") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        # A file cut short is no longer a zip file; NumPy takes junk for a pickle.
        raise ValueError(
            f"{name} holds no result of hessfunc, or is damaged: pass a file that was written by "
            "result.save(path)"
        ) from None


class _MissingFileError(FileNotFoundError, ValueError):
    """A wrong path, which is a wrong argument as well as a missing file."""


class _UnknownKindError(Exception):
    """The kind of a result that this version does not know."""


def _restored(plain: dict[str, Any], prefix: str, arrays: Mapping[str, Any]) -> Result:
    kind = plain.pop("kind")
    if kind not in Result.kinds:
        raise _UnknownKindError(kind)
    values: dict[str, Any] = {}
    for name, item in plain.items():
        key = prefix + name
        if "value" in item:
            values[name] = item["value"]
        elif "tuple" in item:
            values[name] = tuple(item["tuple"])
        elif "result" in item:
            values[name] = _restored(item["result"], f"{key}/", arrays)
        else:
            found = [torch.from_numpy(arrays[f"{key}/{i}"]) for i in range(len(item["paths"]))]
            values[name] = _nested(item["paths"], found)
    return Result.kinds[kind](**values)


def _nested(paths: list[list[str | int]], found: list[Tensor]) -> Tree:
    if paths == [[]]:
        return found[0]
    tree: dict[str | int, Any] = {}
    for path, leaf in zip(paths, found, strict=True):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
