"""Checkpoint of one run: identification of its state, restoring and saving."""

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
from hessfunc.algorithms.checkpoint.segments import Segments, StoredPart
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.starts import drawn_seed
from hessfunc.fingerprints import bytes_of, digest_of, fingerprint
from hessfunc.spaces.space import Space, products_eps
from hessfunc.trees import leaves, whole

State = TypeVar("State")
Directory = str | os.PathLike[str] | None

# Seconds after which a network file system shows a rank the files of another rank.
_PATIENCE = 5.0
# Largest accepted difference of a recomputed product, in units of eps of its length and at most as
# a fraction of its length; or else in units of the rounding that is measured now.
_GRANTED = 32
_MOST = 1e-3
_ROUNDINGS = 4


@dataclass(frozen=True)
class Columns:
    """Option whose rows ``(k, width)`` are this rank's columns of vectors, if they are divided."""

    rows: Tensor


@dataclass
class Checkpoint:
    """Checkpoint of a run, which saves nothing if it has no segments.

    Attributes:
        segments: Segments of the state, or None for a run without a checkpoint.
        options: Algorithm, options and leaves, which a resumed run must not change.
        matrix: Checksums of the parameters, batches or matrices behind the matvec, by kind.
        products: Products of the run, whose counts are part of the state.
        seed: Seed of the run: the given, the stored or a fresh one.
        manifest: Manifest with which the run resumes, or None for a new run.
        stamp: Stamp of the manifest that this run has last read or written.
        owner: Owner of the lock for this process, or None while it does not hold the lock.
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
        """Return the checkpoint of a run, after checks that it can be resumed.

        Args:
            path: Directory, or None for a run without a checkpoint.
            algorithm: Name of the algorithm.
            products: Products of the run.
            seed: Seed of the run, or None for the stored or a fresh one.
            **options: Options that a resumed run must not change: plain values or trees of tensors.

        Raises:
            ValueError: If the directory contains other files, or a state that is damaged or belongs
                to another run; if another run is running in it; or if ranks see different
                directories.
        """
        space = products.space
        known = {
            "algorithm": algorithm,
            "leaves": {
                name: f"{dtype} {tuple(shape)}"
                for name, shape, dtype in zip(space.names, space.shapes, space.dtypes, strict=True)
            },
            "the cut of leaves over ranks": space.cut,
            **{name: _described(value, space) for name, value in options.items()},
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
        """Return the stored state, or the given state of a new run, and lock the directory.

        A stored product is recomputed to check that the matrix is the same. The run holds the
        directory until `release`.

        Raises:
            ValueError: If the stored product differs from the recomputed one, or if another run
                holds the directory.
        """
        if self.segments is None:
            return state
        self._acquire(self.segments)
        self.products.keep_first = True
        if self.manifest is None:
            return state
        segments, first = self.segments, state[0] if isinstance(state, tuple) else state
        home = sys.modules[type(first).__module__]

        def read() -> tuple[Any, Any]:
            return tuple(segments.decoded(self._parts(of), home, of) for of in ("state", "first"))

        stored: State
        stored, self.products.first = self.products.space.on_all(read)
        if self.products.first is not None:
            self._refuse_another_matrix(self.segments.directory, *self.products.first)
        self.products.matvecs = self.manifest["matvecs"]
        self.products.passes = self.manifest["passes"]
        return stored

    def _acquire(self, segments: Segments) -> None:
        """Lock the directory, and check that all ranks see it."""
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
        """Unlock the directory for other runs."""
        if self.segments is None or self.owner is None:
            return
        directory = self.segments.directory
        if not manifests.stamp(directory):
            # The run ends before it has saved a state, and no manifest would identify its files.
            manifests.remove_all_but(directory, self.segments.run, set())
        locks.release(directory, self.owner)
        self.owner = None

    def _parts(self, of: str) -> list[StoredPart]:
        """Return the stored parts of all ranks, of the state or of the first product."""
        assert self.manifest is not None
        return [StoredPart(range(*part["columns"]), part[of]) for part in self.manifest["parts"]]

    def save(self, state: object, /) -> None:
        """Replace the stored state by another."""
        if self.segments is None:
            return
        ranks = self.products.space.ranks
        parts = [self.products.space.on_all(lambda: self._part(state))]
        names = set(self.segments.names)
        if ranks is not None:
            gathered = ranks.objects((parts[0], self.segments.names))
            parts = [part for part, _ in gathered]
            names = {name for _, own in gathered for name in own}

        def replace() -> None:
            if ranks is None or ranks.rank == 0:
                self._replace(parts, names)

        # All ranks wait, so that no rank writes new segments before the old ones are removed.
        self.products.space.on_all(replace)

    def _part(self, state: object) -> dict[str, Any]:
        """Write the segments of this rank, and return its part of the manifest."""
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
        """Replace the manifest, and remove the segments that it does not list."""
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
        """Raise an error unless a stored product equals the recomputed one up to rounding.

        Another processor or block size changes the rounding. The difference of A (3 v) / 3 and A v
        measures it.
        """
        products, space = self.products, self.products.space
        again = products.uncounted(vector[None])
        difference, size = space.norms(torch.cat([again - image[None], image[None]])).tolist()
        if difference <= min(_GRANTED * products_eps(space), _MOST) * size:
            return
        thrice = products.uncounted(3 * vector[None])
        if difference > _ROUNDINGS * float(space.norms(thrice / 3 - again)):
            raise ValueError(
                f"checkpoint {directory}: a stored product of length {size:.1e} differs by "
                f"{difference:.1e} from the recomputed one, so the state belongs to another matrix "
                "(other parameters, data or loss): choose another directory"
            )


def _make(directory: Path) -> None:
    """Create the directory if it does not exist."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"checkpoint {directory}: the directory cannot be created ({error.strerror}): choose a "
            "path that can be written"
        ) from None


def _of_all(known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the options of all ranks; an option that differs between them becomes a digest.

    Options such as the start vector are divided among ranks.
    """
    values = {name: [one[name] for one in known] for name in known[0]}
    return {
        name: each[0] if all(one == each[0] for one in each) else digest_of(repr(each).encode())
        for name, each in values.items()
    }


def _of_matrix(products: Products) -> dict[str, str]:
    """Return the fingerprint of the matvec, of all ranks if leaves are divided among them."""
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
    """Return the prefix of the files of a new run.

    A run that was interrupted before its first saved state leaves a lock, whose prefix is reused.
    """
    before = locks.owner_of(directory)
    run = secrets.token_hex(4) if before is None else before.run
    return run if space.ranks is None else space.ranks.objects(run)[0]


def _refuse_unshared(directory: Path, owner: locks.Owner | None) -> None:
    """Raise an error if this rank does not see the lock that the first rank has just written."""
    assert owner is not None
    deadline = time.monotonic() + _PATIENCE
    while locks.owner_of(directory) != owner:
        if time.monotonic() > deadline:
            raise ValueError(
                f"checkpoint {directory}: the ranks do not share this directory, since this rank "
                f"does not see the lock of process {owner.pid} on host {owner.host}: choose a "
                "directory on a file system that all ranks see"
            )
        time.sleep(0.05)


def _refuse_another_run(
    directory: Path, manifest: dict[str, Any], options: dict[str, Any], seed: int | None
) -> None:
    """Raise an error if an option or the seed differs from that of the stored run."""
    stored = manifest["options"] | {"seed": manifest["seed"]}
    wanted = options | {"seed": manifest["seed"] if seed is None else seed}
    for name in [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"checkpoint {directory}: the state belongs to another run, {name} was "
                f"{stored.get(name)} and is {wanted.get(name)} now: choose another directory"
            )


def _refuse_other_data(directory: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise an error if a checksum differs from that of the stored run."""
    for kind in stored.keys() & wanted.keys():
        if stored[kind] != wanted[kind]:
            raise ValueError(
                f"checkpoint {directory}: the state belongs to another matrix, whose {kind} "
                f"differ from those of this run: pass the same {kind}, or choose another directory"
            )


def _of_another_process(directory: Path) -> ValueError:
    """Return the error of a directory to which another process has written."""
    return ValueError(
        f"checkpoint {directory}: another process has written to it since this run began: choose "
        "another directory, or start this run again to resume from the new state"
    )


def _described(value: Any, space: Space) -> Any:
    """Return a plain option unchanged, and a tree of tensors as the digests of its leaves."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Columns):
        # The whole rows, because a run may resume on another number of ranks.
        value = space.unravel(value.rows)
    return ", ".join(digest_of(bytes_of(whole(leaf))) for leaf in leaves(value))
