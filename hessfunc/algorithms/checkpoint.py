"""The state of a run in a directory: written after each round, read when the run starts again.

Rows of tensors lie in segments, files that are named by the digest of their bytes: rows that a
round appends make a new segment, and those before are not written again. One manifest says which
segments make up the state, and whose state it is. It is replaced in one step, after all segments
that it names are on the disk, and before any other one is removed: whenever a process is killed,
a whole state is there, the one before or the one after.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessfunc.algorithms.rounds import Products, drawn, products_eps, rows_dtype
from hessfunc.files import write_whole
from hessfunc.trees import leaves

__all__ = ["Checkpoint", "Directory"]

State = TypeVar("State")
Directory = str | os.PathLike[str] | None

_MANIFEST = "manifest.json"
_SEGMENT = ".rows"
_FORMAT = 2


@dataclass
class Checkpoint:
    """Where a run keeps its state; nowhere without a path.

    Attributes:
        path: the directory.
        fingerprint: what must be the same for a state to be taken up again.
        products: of the run; its counts and choices are part of the state.
        seed: of the run: as given, as stored, or drawn.
        segments: the segments of each tensor as last written, for their rows to be reused.
    """

    path: Path | None
    fingerprint: dict[str, Any]
    products: Products
    seed: int
    manifest: dict[str, Any] | None = None
    segments: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: Directory,
        algorithm: str,
        products: Products,
        seed: int | None,
        /,
        **options: Any,
    ) -> Checkpoint:
        """Of a run of this algorithm with these options: plain values, or trees of tensors.

        Raises:
            ValueError: the directory holds something else, or a state that is damaged or belongs
                to another run.
        """
        space = products.space
        fingerprint = {
            "algorithm": algorithm,
            "leaves": {
                name: f"{dtype} {tuple(shape)}"
                for name, shape, dtype in zip(space.names, space.shapes, space.dtypes, strict=True)
            },
            **{name: _described(value) for name, value in options.items()},
        }
        if path is None:
            return cls(None, fingerprint, products, space.least(drawn(seed)))
        directory = Path(path)
        manifest = _read_manifest(directory)
        if manifest is None:
            return cls(directory, fingerprint, products, space.least(drawn(seed)))
        _refuse_another_run(directory, manifest, fingerprint, seed)
        return cls(directory, fingerprint, products, manifest["seed"], manifest)

    def restored(self, state: State, /) -> State:
        """The state that was stored, after one stored product has been made again; or this one."""
        if self.path is None:
            return state
        self.products.keep_first = True
        if self.manifest is None:
            return state
        home = sys.modules[type(state).__module__]
        found: State = self._decoded(self.manifest["state"], home, "state")
        self.products.choices.update(self.manifest["choices"])
        self.products.first = self._decoded(self.manifest["first"], home, "first")
        if self.products.first is not None:
            self._refuse_another_matrix(*self.products.first)
        self.products.matvecs = self.manifest["matvecs"]
        self.products.passes = self.manifest["passes"]
        return found

    def save(self, state: object, /) -> None:
        """Replace what is stored."""
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        body = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "matvecs": self.products.matvecs,
            "passes": self.products.passes,
            "choices": self.products.choices,
            "first": self._encoded(self.products.first, "first"),
            "state": self._encoded(state, "state"),
        }
        text = json.dumps(body).encode()
        _flush(self.path)
        write_whole(
            self.path / _MANIFEST,
            lambda file: file.write(_digest(text).encode() + b"\n" + text),
        )
        _flush(self.path)
        needed = {segment["file"] for found in self.segments.values() for segment in found}
        for file in self.path.iterdir():
            if _is_ours(file) and file.name not in (needed | {_MANIFEST}):
                file.unlink()

    def _encoded(self, value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            return self._encoded_tensor(value, key)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                item.name: self._encoded(getattr(value, item.name), f"{key}.{item.name}")
                for item in dataclasses.fields(value)
            }
            return {"state": type(value).__name__, "fields": fields}
        if isinstance(value, tuple):
            return {"tuple": [self._encoded(v, f"{key}[{i}]") for i, v in enumerate(value)]}
        return {"value": value}

    def _encoded_tensor(self, value: Tensor, key: str) -> dict[str, Any]:
        assert self.path is not None
        rows = value.detach().reshape(1) if value.dim() == 0 else value.detach()
        kept, start = [], 0
        for segment in self.segments.get(key, []):
            end = start + segment["rows"]
            if end > len(rows) or _digest(_bytes(rows[start:end])) != segment["digest"]:
                break
            kept.append(segment)
            start = end
        if start < len(rows):
            data = _bytes(rows[start:])
            digest = _digest(data)
            file = self.path / f"{digest}{_SEGMENT}"
            if not file.exists():
                write_whole(file, lambda out: out.write(data))
            kept.append({"file": file.name, "rows": len(rows) - start, "digest": digest})
        self.segments[key] = kept
        return {
            "tensor": kept,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "on_device": value.device == self.products.space.device,
        }

    def _decoded(self, value: dict[str, Any], home: Any, key: str) -> Any:
        if "tensor" in value:
            return self._decoded_tensor(value, key)
        if "state" in value:
            fields = {
                name: self._decoded(item, home, f"{key}.{name}")
                for name, item in value["fields"].items()
            }
            kind = getattr(home, value["state"])
            return kind(**fields)
        if "tuple" in value:
            return tuple(
                self._decoded(item, home, f"{key}[{i}]") for i, item in enumerate(value["tuple"])
            )
        return value["value"]

    def _decoded_tensor(self, value: dict[str, Any], key: str) -> Tensor:
        assert self.path is not None
        data = bytearray()
        for segment in value["tensor"]:
            part = _read_segment(self.path / segment["file"])
            if _digest(part) != segment["digest"]:
                raise _damaged(self.path, f"segment {segment['file']}")
            data += part
        self.segments[key] = value["tensor"]
        dtype = getattr(torch, value["dtype"])
        flat = (
            torch.frombuffer(data, dtype=dtype)
            if data
            else torch.empty(0, dtype=dtype, device="cpu")
        )
        found = flat.reshape(value["shape"])
        return found.to(self.products.space.device) if value["on_device"] else found

    def _refuse_another_matrix(self, vector: Tensor, image: Tensor) -> None:
        products = self.products
        again = products.uncounted(vector[None])[0]
        difference = float((again - image).double().norm())
        size = float(image.double().norm())
        if difference > products_eps(products.space, rows_dtype(products.space)) ** 0.5 * size:
            raise ValueError(
                f"checkpoint {self.path}: a stored product differs by {difference:.1e} of "
                f"{size:.1e} from the one made now, so the state belongs to another matrix (other "
                "parameters, data or loss): choose another directory"
            )


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ValueError(f"checkpoint {directory}: a file is there, and a directory is needed")
    if strangers := [file.name for file in directory.iterdir() if not _is_ours(file)]:
        raise ValueError(
            f"checkpoint {directory}: the directory holds other files ({strangers[0]}): choose "
            "one of its own"
        )
    path = directory / _MANIFEST
    if not path.exists():
        return None
    digest, _, text = path.read_bytes().partition(b"\n")
    if _digest(text).encode() != digest:
        raise _damaged(directory, "the manifest")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {directory}: written in format {manifest['format']}, and this version "
            f"reads format {_FORMAT}: finish the run with the version that began it"
        )
    return manifest


def _refuse_another_run(
    directory: Path, manifest: dict[str, Any], fingerprint: dict[str, Any], seed: int | None
) -> None:
    stored = manifest["fingerprint"] | {"seed": manifest["seed"]}
    wanted = fingerprint | {"seed": manifest["seed"] if seed is None else seed}
    for name in [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"checkpoint {directory}: the state belongs to another run, {name} was "
                f"{stored.get(name)} and is {wanted.get(name)} now: choose another directory"
            )


def _damaged(directory: Path, what: str) -> ValueError:
    return ValueError(
        f"checkpoint {directory}: {what} is damaged, nothing was changed: restore it from a copy, "
        "or choose another directory to begin anew"
    )


def _read_segment(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _damaged(path.parent, f"segment {path.name} is missing, so the state") from None


def _is_ours(file: Path) -> bool:
    name = file.name.removesuffix(".part")
    return name == _MANIFEST or name.endswith(_SEGMENT)


def _flush(directory: Path) -> None:
    """Names of new files are on the disk only when the directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _described(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(_digest(_bytes(leaf)) for leaf in leaves(value))


def _bytes(rows: Tensor) -> memoryview:
    return rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
