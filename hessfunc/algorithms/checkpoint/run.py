"""The checkpoint of one run: whose state it is, when it is read, when it is replaced."""

from __future__ import annotations

import os
import secrets
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import lock as locks
from hessfunc.algorithms.checkpoint import manifest as manifests
from hessfunc.algorithms.checkpoint.segments import Part, Segments
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.starts import drawn_seed
from hessfunc.fingerprints import bytes_of, digest_of, fingerprint
from hessfunc.spaces.space import Space, products_eps, rows_dtype
from hessfunc.trees import leaves, whole

State = TypeVar("State")
Directory = str | os.PathLike[str] | None

# Seconds after which a network file system shows a rank what another one has written.
_PATIENCE = 5.0
# A product that is made again may differ by so many eps, up to a share of its length; or else by
# so many times the rounding that is measured now.
_GRANTED = 32
_MOST = 1e-3
_ROUNDINGS = 4


@dataclass
class Checkpoint:
    """Where a run keeps its state; nowhere without segments.

    Attributes:
        segments: of the state.
        options: Algorithm, options and leaves, which must be the same to resume.
        matrix: Checksums of the parameters, batches or matrices behind the matvec, by kind.
        products: Products of the run; their counts are part of the state.
        seed: of the run: as given, as stored, or drawn.
        manifest: what was found.
        stamp: of the manifest that this run has read or written last.
        owner: This process, while it holds the lock of the directory.
    """

    segments: Segments | None
    options: dict[str, Any]
    matrix: dict[str, str]
    products: Products
    seed: int
    manifest: dict[str, Any] | None = None
    stamp: str = ""
    owner: locks.Owner | None = None

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
            ValueError: the directory holds something else, a state that is damaged or belongs to
                another run, or another run is going on in it; or ranks see different ones.
        """
        space = products.space
        known = {
            "algorithm": algorithm,
            "leaves": {
                name: f"{dtype} {tuple(shape)}"
                for name, shape, dtype in zip(space.names, space.shapes, space.dtypes, strict=True)
            },
            "the cut of leaves over ranks": space.cut,
            **{name: _described(value) for name, value in options.items()},
        }
        if path is None:
            return cls(None, known, {}, products, drawn_seed(space, seed))
        if space.ranks is not None:
            known = _of_all(space.ranks.objects(known))
        directory = Path(path)
        space.on_all(lambda: locks.refuse_if_held(directory))
        stamp = manifests.stamp(directory)
        if space.ranks is not None:
            same = {
                f"the checkpoint {directory}, which all must see": zlib.crc32(stamp.encode()) >> 4
            }
            space.ranks.agree(same, space.device)
        manifest = space.on_all(lambda: manifests.read(directory))
        matrix = _of_matrix(products)
        run = _prefix(space, directory) if manifest is None else manifest["run"]
        segments = Segments(directory, run, space)
        if manifest is None:
            space.on_all(lambda: manifests.refuse_other_files(directory, run))
            return cls(segments, known, matrix, products, drawn_seed(space, seed))
        space.on_all(lambda: _refuse_another_run(directory, manifest, known, seed))
        space.on_all(lambda: _refuse_other_data(directory, manifest["matrix"], matrix))
        return cls(segments, known, matrix, products, manifest["seed"], manifest, stamp)

    def restored(self, state: State, /) -> State:
        """The stored state, after one stored product has been made again; or the given state.

        The directory then belongs to this run, until `release`.
        """
        if self.segments is None:
            return state
        self._acquire(self.segments)
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

    def _acquire(self, segments: Segments) -> None:
        """Take the directory, which all ranks must see."""
        space, directory = self.products.space, segments.directory

        def take() -> None:
            if space.ranks is None or space.ranks.rank == 0:
                _make(directory)
                self.owner = locks.acquire(directory, segments.run)
                if manifests.stamp(directory) != self.stamp:
                    self.release()
                    raise _of_another_process(directory)

        space.on_all(take)
        if space.ranks is not None:
            owner = space.ranks.objects(self.owner)[0]
            space.on_all(lambda: _refuse_unshared(directory, owner))

    def release(self) -> None:
        """Let other runs have the directory."""
        if self.segments is None or self.owner is None:
            return
        directory = self.segments.directory
        if not manifests.stamp(directory):
            # The run ends before it has a state, so nothing would say whose its files are.
            manifests.remove_all_but(directory, self.segments.run, set())
        locks.release(directory, self.owner)
        self.owner = None

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
                "first": self.segments.encoded(self.products.first, "first", divided=True),
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
                "run": self.segments.run,
                "options": self.options,
                "matrix": self.matrix,
                "seed": self.seed,
                "matvecs": self.products.matvecs,
                "passes": self.products.passes,
                "parts": parts,
            },
        )
        manifests.remove_all_but(directory, self.segments.run, names)

    def _refuse_another_matrix(self, directory: Path, vector: Tensor, image: Tensor) -> None:
        """Raise unless a stored product is the one made now, up to rounding.

        Another processor or block size rounds anew; so does a product with three times the vector,
        whose distance from three products measures the rounding.
        """
        products, space = self.products, self.products.space
        again = products.uncounted(vector[None])
        difference, size = space.norms(torch.cat([again - image[None], image[None]])).tolist()
        if difference <= min(_GRANTED * products_eps(space, rows_dtype(space)), _MOST) * size:
            return
        thrice = products.uncounted(3 * vector[None])
        if difference > _ROUNDINGS * float(space.norms(thrice / 3 - again)):
            raise ValueError(
                f"checkpoint {directory}: a stored product differs by {difference:.1e} of "
                f"{size:.1e} from the one made now, so the state belongs to another matrix (other "
                "parameters, data or loss): choose another directory"
            )


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"checkpoint {directory}: the directory cannot be made ({error.strerror}): choose one "
            "that can be written"
        ) from None


def _of_all(known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options of all ranks, which may each hold a part of a vector, such as the start."""
    values = {name: [one[name] for one in known] for name in known[0]}
    return {
        name: each[0] if all(one == each[0] for one in each) else digest_of(repr(each).encode())
        for name, each in values.items()
    }


def _of_matrix(products: Products) -> dict[str, str]:
    """The fingerprint of the matvec; where leaves are cut over ranks, that of all parts."""
    space = products.space
    mine = space.on_all(lambda: dict(fingerprint(products.matvec)))
    if space.ranks is None:
        return mine
    if space.cut is None:
        space.ranks.alike(mine)
        return mine
    parts = space.ranks.objects(mine)
    return {kind: digest_of(repr([part.get(kind) for part in parts]).encode()) for kind in mine}


def _prefix(space: Space, directory: Path) -> str:
    """The prefix of the files of a new run, or of one that was interrupted before its first."""
    before = locks.owner_of(directory)
    run = secrets.token_hex(4) if before is None else before.run
    return run if space.ranks is None else space.ranks.objects(run)[0]


def _refuse_unshared(directory: Path, owner: locks.Owner | None) -> None:
    """Raise where this rank does not see the lock that the first one has just written."""
    assert owner is not None
    deadline = time.monotonic() + _PATIENCE
    while locks.owner_of(directory) != owner:
        if time.monotonic() > deadline:
            raise ValueError(
                f"checkpoint {directory}: the ranks do not share this directory, as the lock that "
                f"process {owner.pid} on host {owner.host} has written is not in it here: choose "
                "a directory on a file system that all ranks see"
            )
        time.sleep(0.05)


def _refuse_another_run(
    directory: Path, manifest: dict[str, Any], options: dict[str, Any], seed: int | None
) -> None:
    stored = manifest["options"] | {"seed": manifest["seed"]}
    wanted = options | {"seed": manifest["seed"] if seed is None else seed}
    for name in [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"checkpoint {directory}: the state belongs to another run, {name} was "
                f"{stored.get(name)} and is {wanted.get(name)} now: choose another directory"
            )


def _refuse_other_data(directory: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    for kind in stored.keys() & wanted.keys():
        if stored[kind] != wanted[kind]:
            raise ValueError(
                f"checkpoint {directory}: the state belongs to another matrix, whose {kind} "
                f"differ from those of this run: pass the same {kind}, or choose another directory"
            )


def _of_another_process(directory: Path) -> ValueError:
    return ValueError(
        f"checkpoint {directory}: another process has written to it since this run began: choose "
        "another directory, or start again to resume from its state"
    )


def _described(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(digest_of(bytes_of(whole(leaf))) for leaf in leaves(value))
