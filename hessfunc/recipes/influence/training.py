"""Pass over the training examples, which ranks divide and a checkpoint resumes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Saved, load
from hessfunc.containers import number_of
from hessfunc.display import Reported, reporting
from hessfunc.fingerprints import checksum, of_batches
from hessfunc.losses import LossFunction
from hessfunc.recipes.influence.tokens import TokenLosses, token_scores
from hessfunc.spaces.inner_products import gram
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.transforms.batches.sums import Partition
from hessfunc.transforms.example_gradients import example_gradients
from hessfunc.trees import Tree

Made = TypeVar("Made")

# Number of entries of a row whose products are summed in its own dtype.
_RUN = 1024
NO_EXAMPLE = "there is no training example: pass at least one batch in `train_batches`"


@dataclass(frozen=True)
class BatchScores(Saved):
    """Scores of the m examples of one training batch for r solutions.

    Attributes:
        parts: Inner products of gradients and solutions by leaf, float64 ``(leaves, r, m)``.
        norms: Norm of the gradient of each example, float64 ``(m,)``.
        tokens: Part of each token, float64 ``(r, m, T)``; None if not requested.
        key: Checksum of the batch; empty without a checkpoint.
    """

    parts: Tensor
    norms: Tensor
    tokens: Tensor | None
    key: str


def scores_of(
    loss: LossFunction,
    params: Tree,
    batch: Any,
    solutions: Tensor,
    tokens: TokenLosses | None,
    examples_per_chunk: int | None,
    key: str,
    /,
) -> BatchScores:
    """Return the scores of the examples of a batch for solutions ``(r, n)``."""
    space = space_of(params)
    parts, norms = [], []
    for block in example_gradients(loss, params, batch, examples_per_chunk=examples_per_chunk):
        rows = space.ravel(block, dtype=rows_dtype(space))
        norms.append(space.norms(rows))
        parts.append(_by_leaf(space, solutions, rows).cpu())
    whole, of_tokens = torch.cat(parts, -1), None
    if tokens is not None:
        of_tokens = token_scores(tokens, params, batch, solutions, whole.sum(0))
    return BatchScores(whole, torch.cat(norms).cpu(), of_tokens, key)


def joined_scores(batches: Sequence[BatchScores], /) -> BatchScores:
    """Return the scores of all batches, in the order of the data.

    Raises:
        ValueError: If batches have other numbers of tokens.
    """
    tokens = [one.tokens for one in batches if one.tokens is not None]
    if len({part.shape[2] for part in tokens}) > 1:
        raise ValueError(
            "batches have examples with other numbers of tokens: pad all examples to the same "
            "length"
        )
    return BatchScores(
        torch.cat([one.parts for one in batches], -1),
        torch.cat([one.norms for one in batches]),
        torch.cat(tokens, 1) if tokens else None,
        "",
    )


@dataclass(frozen=True)
class TrainingPass:
    """Pass over the training batches, which ranks divide and a checkpoint resumes.

    Attributes:
        batches: Training batches.
        partition: Batches of this rank.
        checkpoint: Directory with a file for each finished batch, or None.
        progress: Function of the progress.
        task: Name of the function, for the progress.
        settings: Checksum of the parameters and options that the scores of a batch depend on.
        is_collective: Whether all ranks evaluate each batch together, because their products with
            the matrix are collective, instead of dividing the batches.
    """

    batches: Iterable[Any]
    partition: Partition
    checkpoint: Path | None
    progress: Reported
    task: str
    settings: str = ""
    is_collective: bool = False

    def __call__(self, make: Callable[[Any, str], Made], /) -> list[Made]:
        """Return ``make(batch, key)``, an object with the field ``key``, for all batches in order.

        Raises:
            ValueError: If there is no batch, or if a batch of the checkpoint is another one.
        """
        if self.is_collective:
            every = self._own(make)
        else:
            own = self.partition.all_well(lambda: self._own(make))
            parts = self.partition.gathered(own)
            every = {place: one for part in parts for place, one in part.items()}
        if not every:
            raise ValueError(NO_EXAMPLE)
        return [every[place] for place in sorted(every)]

    def _own(self, make: Callable[[Any, str], Made]) -> dict[int, Made]:
        """Return the objects of the batches of this rank, by their place among all batches."""
        total = number_of(self.batches)
        own: dict[int, Made] = {}
        with reporting(self.progress, self.task, total=total, unit="batches") as report:
            for done, batch in enumerate(self.batches):
                place = done if self.is_collective else self.partition.place(done)
                if place is not None:
                    own[place] = self._of_place(place, batch, make)
                if report is not None:
                    report(done + 1)
        return own

    def _of_place(self, place: int, batch: Any, make: Callable[[Any, str], Made]) -> Made:
        if self.checkpoint is None:
            return make(batch, "")
        file = self.checkpoint / f"batch-{place:06d}.npz"
        key = f"{self.settings}{of_batches([batch])}"
        exists, writes = file.exists(), self.partition.writes
        if self.is_collective:
            exists = all(self.partition.gathered(exists))
            writes = writes and self.partition.place(0) == 0
        made: Made = stored(file, key, partial(make, batch, key), exists=exists, writes=writes)
        return made


def directory_of(
    checkpoint: str | os.PathLike[str] | None, params: Tree, /
) -> tuple[Path | None, str]:
    """Return the directory of a checkpoint, which is created, and the checksum of the parameters.

    Without a checkpoint, they are None and empty.
    """
    if checkpoint is None:
        return None, ""
    directory = Path(checkpoint)
    directory.mkdir(parents=True, exist_ok=True)
    return directory, checksum(space_of(params).tree_leaves(params))


def stored(file: Path, key: str, make: Callable[[], Any], /, *, exists: bool, writes: bool) -> Any:
    """Return an object with a field ``key`` from its file, or make it, and write it if asked.

    Raises:
        ValueError: If the object of the file has another key.
    """
    if not exists:
        made: Any = make()
        if writes:
            made.save(file)
        return made
    found = load(file)
    if found.key != key:
        raise ValueError(
            f"{file} was computed from other parameters, data or options: pass the same arguments "
            "(with `seed=` for sampled targets), or another directory as checkpoint"
        )
    return found


def _by_leaf(space: Space, rows: Tensor, others: Tensor) -> Tensor:
    """Return the inner products of rows for each leaf, float64 ``(leaves, j, k)``."""
    pairs = zip(rows.split(space.sizes, 1), others.split(space.sizes, 1), strict=True)
    return torch.stack([gram(one, two, run=_RUN) for one, two in pairs])
