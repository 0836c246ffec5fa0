"""Conversion of a state to plain values, with its tensors in segments, and back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessfunc import files
from hessfunc.algorithms.checkpoint.manifest import SEGMENT, damaged
from hessfunc.fingerprints import bytes_of, digest_of
from hessfunc.spaces.space import DIVIDED, Space


@dataclass(frozen=True)
class StoredPart:
    """Part of a state that one rank has written.

    Attributes:
        columns: Columns of the vectors that the rank held.
        values: State as plain values. Only vectors differ between ranks; all other values are read
            from the first rank.
    """

    columns: range
    values: Any


@dataclass
class Segments:
    """Segments of one rank's part of a state.

    Attributes:
        directory: Directory of the run.
        run: Prefix of the names of the files of the run.
        space: Space of the vectors.
        written: Segments of each tensor in the last saved state, by the tensor's key. Segments with
            unchanged rows are reused.
    """

    directory: Path
    run: str
    space: Space
    written: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the files with the last saved state of this rank."""
        return [segment["file"] for segments in self.written.values() for segment in segments]

    def encoded(self, value: Any, key: str, *, divided: bool = False) -> Any:
        """Return a value as plain data, with its tensors written to segments.

        Args:
            value: Dataclass, tuple, tensor or plain value.
            key: Place of the value in the state.
            divided: Whether the last axis of the tensors is divided among ranks, as for `Rows`.
        """
        if isinstance(value, Tensor):
            if not divided and self.space.ranks is not None and self.space.ranks.rank:
                return {"of_first": True}
            return self._encoded_tensor(value, key) | {"cut": divided}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                item.name: self.encoded(
                    getattr(value, item.name),
                    f"{key}.{item.name}",
                    divided=item.metadata == DIVIDED,
                )
                for item in dataclasses.fields(value)
            }
            return {"state": type(value).__name__, "fields": fields}
        if isinstance(value, tuple):
            return {
                "tuple": [
                    self.encoded(part, f"{key}[{i}]", divided=divided)
                    for i, part in enumerate(value)
                ]
            }
        return {"value": value}

    def _encoded_tensor(self, value: Tensor, key: str) -> dict[str, Any]:
        """Return a tensor as plain data, after writing the rows that no segment contains yet."""
        rows = value.detach().reshape(1) if value.dim() == 0 else value.detach()
        kept, start = [], 0
        for segment in self.written.get(key, []):
            end = start + segment["rows"]
            if end > len(rows) or digest_of(bytes_of(rows[start:end])) != segment["digest"]:
                break
            kept.append(segment)
            start = end
        if start < len(rows):
            data = bytes_of(rows[start:])
            digest = digest_of(data)
            file = self.directory / self._name(digest)
            if not file.exists():
                files.write_whole(file, lambda out: out.write(data))
            kept.append({"file": file.name, "rows": len(rows) - start, "digest": digest})
        self.written[key] = kept
        return {
            "tensor": kept,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "on_device": value.device == self.space.device,
        }

    def _name(self, digest: str) -> str:
        """Return the name of the segment with a digest."""
        # Ranks may write the same bytes at the same time, so the name includes the rank.
        ranks = self.space.ranks
        rank = "" if ranks is None else f".{ranks.rank}"
        return f"{self.run}-{digest}{rank}{SEGMENT}"

    def decoded(self, parts: Sequence[StoredPart], home: Any, key: str) -> Any:
        """Return a value from the parts of all ranks, as `encoded` has written them.

        Args:
            parts: Parts in the order of ranks.
            home: Module that defines or imports the dataclass of the value.
            key: Place of the value in the state.

        Raises:
            ValueError: If a segment is missing or damaged.
        """
        first = parts[0].values
        if "tensor" in first:
            return self._decoded_tensor(parts, key)
        if "state" in first:
            kind = getattr(home, first["state"])
            # A field's class is imported where the class of the state is defined.
            inner = sys.modules[kind.__module__]
            fields = {
                name: self.decoded(_inside(parts, "fields", name), inner, f"{key}.{name}")
                for name in first["fields"]
            }
            return kind(**fields)
        if "tuple" in first:
            return tuple(
                self.decoded(_inside(parts, "tuple", i), home, f"{key}[{i}]")
                for i in range(len(first["tuple"]))
            )
        return first["value"]

    def _decoded_tensor(self, parts: Sequence[StoredPart], key: str) -> Tensor:
        """Return a tensor, with the columns of this rank if it is divided among ranks."""
        first = parts[0].values
        tensor = self._together(parts, key) if first["cut"] else self._read(first)
        if not first["cut"] and (self.space.ranks is None or not self.space.ranks.rank):
            self.written[key] = first["tensor"]
        return tensor.to(self.space.device) if first["on_device"] else tensor

    def _together(self, parts: Sequence[StoredPart], key: str) -> Tensor:
        """Return the columns of this rank, joined from the parts that contain them."""
        mine, pieces = self.space.columns, []
        for part in parts:
            begin, end = max(part.columns.start, mine.start), min(part.columns.stop, mine.stop)
            if part.columns == mine:
                self.written[key] = part.values["tensor"]
                return self._read(part.values)
            # The first part is kept even if it is empty, so that there is a piece to join.
            if begin < end or part is parts[0]:
                offset = part.columns.start
                end = max(begin, end)
                pieces.append(self._read(part.values)[..., begin - offset : end - offset])
        return torch.cat(pieces, dim=-1)

    def _read(self, value: dict[str, Any]) -> Tensor:
        """Return the tensor that the segments of one rank contain."""
        data = bytearray()
        for segment in value["tensor"]:
            part = self._read_segment(segment["file"])
            if digest_of(part) != segment["digest"]:
                raise damaged(self.directory, f"segment {segment['file']}")
            data += part
        dtype = getattr(torch, value["dtype"])
        flat = (
            torch.frombuffer(data, dtype=dtype)
            if data
            else torch.empty(0, dtype=dtype, device="cpu")
        )
        return flat.reshape(value["shape"])

    def _read_segment(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            raise damaged(self.directory, f"segment {name} is missing, so the state") from None


def _inside(parts: Sequence[StoredPart], kind: str, at: Any) -> list[StoredPart]:
    """Return the parts of one field of a dataclass, or of one item of a tuple."""
    return [StoredPart(part.columns, part.values[kind][at]) for part in parts]
