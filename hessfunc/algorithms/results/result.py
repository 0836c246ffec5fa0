"""Common fields of results, and saving and loading without pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from optree import MappingEntry, PyTreeAccessor, PyTreeEntry, PyTreeSpec
from torch import Tensor

from hessfunc.display import NOTHING, Achieved, Displayed
from hessfunc.files import write_whole
from hessfunc.options import path as as_path
from hessfunc.options import validated
from hessfunc.trees import Tree, flatten, leaves

AnyResult = TypeVar("AnyResult", bound="Result")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, by name."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {"torch": torch.__version__, "numpy": np.__version__}
    try:
        packages["hessfunc"] = version("hessfunc")
    except PackageNotFoundError:
        packages["hessfunc"] = "not installed"
    return packages


class Saved:
    """Base class of dataclasses that can be saved, and loaded with `load`."""

    kinds: ClassVar[dict[str, type[Saved]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Saved.kinds[cls.__name__] = cls

    def _saved(self) -> dict[str, Any]:
        """Return the values to save, by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def _loaded(cls, values: dict[str, Any]) -> Saved:
        """Return the object with these values, as `_saved` returns them."""
        return cls(**values)

    def save(self, path: str | os.PathLike[str], /) -> None:
        """Write the result to one ``.npz`` file, which `load` reads without pickle.

        The file is written completely or not at all. `load` returns trees as nested dicts. Keys of
        dicts that are strings or integers are kept; all other keys become strings.

        Args:
            path: Path of the file.

        Raises:
            TypeError: If ``path`` is not a path.
            ValueError: If the file cannot be written, or if two keys of a tree have the same name
                in the file.
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


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(Displayed, Saved):
    """Base class of all results, with the cost of the run and its reason to stop.

    Attributes:
        matvecs: Number of products with one vector.
        passes: Number of calls of the matvec; each multiplies a whole block of vectors.
        reason: Reason for which the run stopped, such as "converged: ..." or "budget exhausted
            ...".
        seed: Seed with which the run can be repeated, or None if nothing random took part.
        versions: Versions of the packages that made the result, by name.
    """

    matvecs: int
    passes: int
    reason: str
    seed: int | None
    versions: dict[str, str] = field(default_factory=versions)

    def _summary(self) -> dict[str, str]:
        return {**super()._summary(), "matvecs": str(self.matvecs), "reason": self.reason}

    def achieved(self) -> Achieved:
        """Return the numbers that show how far a running result is."""
        return NOTHING


def judged(result: AnyResult, reason: str | None, /) -> AnyResult:
    """Return the last result of a run, which has converged if its own numbers say so.

    A run that exhausts its budget may reach the tolerance in its last round. An exact result may
    miss its tolerance because of rounding.

    Args:
        result: Result with the reason for which the run stopped.
        reason: Reason for which the result is within the tolerance, or None if it is not.
    """
    if reason is None or result.reason == reason:
        return result
    if result.reason.startswith("exact"):
        reason = f"{reason} ({result.reason})"
    return dataclasses.replace(result, reason=reason)


def array(tensor: Tensor, /) -> np.ndarray[Any, Any]:
    """Return a tensor as a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return known.detach().cpu().numpy()


def _plain(result: Saved, prefix: str, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Return the fields of a result as plain data, and put its tensors into ``arrays``."""
    plain: dict[str, Any] = {"kind": type(result).__name__}
    for name, value in result._saved().items():
        key = prefix + name
        if isinstance(value, Saved):
            plain[name] = {"result": _plain(value, f"{key}/", arrays)}
        elif isinstance(value, (dict, tuple)) and _is_all_saved(value):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            plain[name] = {
                "results": {i: _plain(each, f"{key}/{i}/", arrays) for i, each in items},
                "is_tuple": isinstance(value, tuple),
            }
        elif isinstance(value, Tensor) or _is_tree(value):
            tensors, structure = flatten(value)
            plain[name] = {"paths": _paths(name, structure)}
            for i, leaf in enumerate(tensors):
                arrays[f"{key}/{i}"] = array(leaf)
        elif isinstance(value, torch.Size):
            plain[name] = {"size": value}
        elif isinstance(value, tuple):
            plain[name] = {"tuple": value}
        else:
            plain[name] = {"value": value}
    return plain


def _is_all_saved(values: dict[str, Any] | tuple[Any, ...]) -> bool:
    each = values.values() if isinstance(values, dict) else values
    return bool(values) and all(isinstance(value, Saved) for value in each)


def _paths(name: str, structure: PyTreeSpec) -> list[list[str | int]]:
    """Return the keys that lead to each leaf of a tree: integer keys of dicts, and strings."""
    paths = [[_key(entry) for entry in accessor] for accessor in structure.accessors()]
    seen: dict[tuple[str | int, ...], PyTreeAccessor] = {}
    for path, accessor in zip(map(tuple, paths), structure.accessors(), strict=True):
        if path in seen:
            raise ValueError(
                f"{accessor.codify(name)} and {seen[path].codify(name)} would have the same name "
                "in the file: use strings or integers as the keys of the parameters"
            )
        seen[path] = accessor
    return paths


def _key(entry: PyTreeEntry) -> str | int:
    """Return the key of an entry: an integer for an integer key of a dict, else a string."""
    key = entry.entry
    whole = isinstance(key, int | np.integer) and not isinstance(key, bool)
    return int(key) if whole and isinstance(entry, MappingEntry) else str(key)


def _is_tree(value: Any) -> bool:
    """Return whether a value is a tree of tensors with at least one leaf."""
    entries = leaves(value)
    return bool(entries) and all(isinstance(leaf, Tensor) for leaf in entries)


@validated
def load(path: str | os.PathLike[str], /) -> Any:
    """Load a result that its ``save`` method has written.

    Args:
        path: Path of the file.

    Returns:
        Result of the class that was saved.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a result of hessfunc, is damaged, or was written by a version
            with other kinds of results.
    """
    name = os.fspath(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return _restored(json.loads(file["result"].tobytes()), "", file)
    except _UnknownKindError as kind:
        raise ValueError(
            f"{name} holds a result of class {kind.args[0]!r}, which this version of hessfunc does "
            "not have: load it with the version that wrote it"
        ) from None
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
        raise _MissingFileError(
            f"there is no file {name}: pass the path that result.save(path) has written"
        ) from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        # A truncated file is no zip file, and NumPy takes other bytes for a pickle.
        raise ValueError(
            f"{name} is not a result of hessfunc, or is damaged: pass a file that "
            "result.save(path) has written"
        ) from None


class _MissingFileError(FileNotFoundError, ValueError):
    """Missing file, caught both as a missing file and as a wrong argument."""


# Packages above this one with more classes that can be saved, imported when a file has one of them.
_LATER = ("hessfunc.kronecker", "hessfunc.recipes.calibration", "hessfunc.recipes.laplace")


class _UnknownKindError(Exception):
    """Class of a result that this version does not have."""


def _restored(plain: dict[str, Any], prefix: str, arrays: Mapping[str, Any]) -> Saved:
    """Return the result that `_plain` has turned into plain data and arrays."""
    kind = plain.pop("kind")
    if kind not in Saved.kinds:
        for package in _LATER:
            import_module(package)
    if kind not in Saved.kinds:
        raise _UnknownKindError(kind)
    values: dict[str, Any] = {}
    for name, item in plain.items():
        key = prefix + name
        if "value" in item:
            values[name] = item["value"]
        elif "tuple" in item:
            values[name] = tuple(item["tuple"])
        elif "size" in item:
            values[name] = torch.Size(item["size"])
        elif "result" in item:
            values[name] = _restored(item["result"], f"{key}/", arrays)
        elif "results" in item:
            parts = item["results"].items()
            each = {i: _restored(part, f"{key}/{i}/", arrays) for i, part in parts}
            values[name] = tuple(each.values()) if item["is_tuple"] else each
        else:
            tensors = [torch.from_numpy(arrays[f"{key}/{i}"]) for i in range(len(item["paths"]))]
            values[name] = _nested(item["paths"], tensors)
    return Saved.kinds[kind]._loaded(values)


def _nested(paths: list[list[str | int]], tensors: list[Tensor]) -> Tree:
    """Return the nested dict with these leaves at these paths, or a single tensor."""
    if paths == [[]]:
        return tensors[0]
    tree: dict[str | int, Any] = {}
    for path, leaf in zip(paths, tensors, strict=True):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
