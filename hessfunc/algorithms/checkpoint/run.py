"""The checkpoint of one run: whose state it is, when it is read, when it is replaced."""

from __future__ import annotations

import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hessfunc.algorithms.checkpoint import manifest as manifests
from hessfunc.algorithms.checkpoint.segments import Part, Segments, bytes_of
from hessfunc.algorithms.rounds import Products, drawn, products_eps, rows_dtype
from hessfunc.trees import Space, leaves, whole

__all__ = ["Checkpoint", "Directory"]

State = TypeVar("State")
Directory = str | os.PathLike[str] | None


@dataclass
class Checkpoint:
    """Where a run keeps its state; nowhere without segments.

    Attributes:
        segments: of the state.
        fingerprint: what must be the same for a state to be taken up again.
        products: Products of the run; their counts are part of the state.
        seed: of the run: as given, as stored, or drawn.
        manifest: what was found.
        stamp: of the manifest that this run has read or written last.
    """

    segments: Segments | None
    fingerprint: dict[str, Any]
    products: Products
    seed: int
    manifest: dict[str, Any] | None = None
    stamp: str = ""

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
                to another run, or ranks see different ones.
        """
        space = products.space
        fingerprint = {
            "algorithm": algorithm,
            "leaves": {
                name: f"{dtype} {tuple(shape)}"
                for name, shape, dtype in zip(space.names, space.shapes, space.dtypes, strict=True)
            },
            "the cut of leaves over ranks": space.cut,
            **{name: _described(value) for name, value in options.items()},
        }
        if space.ranks is not None:
            _refuse_unlike_seeds(space, seed)
        if path is None:
            return cls(None, fingerprint, products, drawn(space, seed))
        directory = Path(path)
        segments = Segments(directory, space)
        stamp = manifests.stamp(directory)
        if space.ranks is not None:
            same = {
                f"the checkpoint {directory}, which all must see": zlib.crc32(stamp.encode()) >> 4
            }
            space.ranks.agree(same, space.device)
        manifest = manifests.read(directory)
        if manifest is None:
            return cls(segments, fingerprint, products, drawn(space, seed))
        space.on_all(lambda: _refuse_another_run(directory, manifest, fingerprint, seed))
        return cls(segments, fingerprint, products, manifest["seed"], manifest, stamp)

    def restored(self, state: State, /) -> State:
        """The state that was stored, after one stored product has been made again; or this one."""
        if self.segments is None:
            return state
        self.products.keep_first = True
        if self.manifest is None:
            return state
        segments, home = self.segments, sys.modules[type(state).__module__]

        def read() -> tuple[Any, Any]:
            return tuple(segments.decoded(self._parts(of), home, of) for of in ("state", "first"))

        found: State
        found, self.products.first = self.products.space.on_all(read)
        if self.products.first is not None:
            self._refuse_another_matrix(self.segments.directory, *self.products.first)
        self.products.matvecs = self.manifest["matvecs"]
        self.products.passes = self.manifest["passes"]
        return found

    def _parts(self, of: str) -> list[Part]:
        assert self.manifest is not None
        return [Part(range(*part["columns"]), part[of]) for part in self.manifest["parts"]]

    def save(self, state: object, /) -> None:
        """Replace what is stored."""
        if self.segments is None:
            return
        ranks = self.products.space.ranks
        parts = [self.products.space.on_all(lambda: self._part(state))]
        names = set(self.segments.names)
        if ranks is not None:
            found = ranks.objects((parts[0], self.segments.names))
            parts, names = [part for part, _ in found], {name for _, own in found for name in own}

        def replace() -> None:
            if ranks is None or ranks.rank == 0:
                self._replace(parts, names)

        # No rank writes segments of the next state before those of the last are removed.
        self.products.space.on_all(replace)

    def _part(self, state: object) -> dict[str, Any]:
        assert self.segments is not None
        self.segments.directory.mkdir(parents=True, exist_ok=True)
        columns = self.products.space.columns
        try:
            return {
                "columns": [columns.start, columns.stop],
                "first": self.segments.encoded(self.products.first, "first", "Rows"),
                "state": self.segments.encoded(state, "state"),
            }
        except FileNotFoundError as removed:
            raise _of_another_process(self.segments.directory) from removed

    def _replace(self, parts: list[dict[str, Any]], names: set[str]) -> None:
        assert self.segments is not None
        directory = self.segments.directory
        if manifests.stamp(directory) != self.stamp:
            raise _of_another_process(directory)
        self.stamp = manifests.replace(
            directory,
            {
                "fingerprint": self.fingerprint,
                "seed": self.seed,
                "matvecs": self.products.matvecs,
                "passes": self.products.passes,
                "parts": parts,
            },
        )
        manifests.remove_all_but(directory, names)

    def _refuse_another_matrix(self, directory: Path, vector: Tensor, image: Tensor) -> None:
        products, space = self.products, self.products.space
        again = products.uncounted(vector[None])
        difference = float(space.norms(again - image[None]))
        size = float(space.norms(image[None]))
        if difference > products_eps(space, rows_dtype(space)) ** 0.5 * size:
            raise ValueError(
                f"checkpoint {directory}: a stored product differs by {difference:.1e} of "
                f"{size:.1e} from the one made now, so the state belongs to another matrix (other "
                "parameters, data or loss): choose another directory"
            )


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


def _of_another_process(directory: Path) -> ValueError:
    return ValueError(
        f"checkpoint {directory}: another process has written to it since this run began; "
        "processes that run the same algorithm side by side need a directory each, or one space "
        "of vectors that are cut over them: `space=sharded(params, mesh)`"
    )


def _refuse_unlike_seeds(space: Space, seed: int | None) -> None:
    assert space.ranks is not None
    given = -1 if seed is None else seed
    halves = {"seed=": given & 0xFFFFFFFF, "the upper half of seed=": given >> 32}
    space.ranks.agree(halves, space.device)


def _described(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(manifests.digest_of(bytes_of(whole(leaf))) for leaf in leaves(value))
