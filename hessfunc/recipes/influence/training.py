"""Pass over the training examples, which ranks divide and a checkpoint resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Saved, load
from hessfunc.display import Reported, reporting
from hessfunc.fingerprints import of_batches
from hessfunc.losses import LossFunction
from hessfunc.recipes.influence.tokens import TokenLosses, token_scores
from hessfunc.spaces.inner_products import gram
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.transforms.batches.sums import Partition
from hessfunc.transforms.example_gradients import example_gradients
from hessfunc.trees import Tree

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


@dataclass(frozen=True)
class TrainingPass:
    """Pass over the training batches.

    Attributes:
        loss: Training loss.
        params: Trained parameters.
        batches: Training batches.
        examples_per_chunk: Number of examples that are differentiated at once.
        tokens: Losses of the tokens, or None.
        partition: Batches of this rank.
        checkpoint: Directory with a file for each finished batch, or None.
        progress: Function of the progress.
    """

    loss: LossFunction
    params: Tree
    batches: Iterable[Any]
    examples_per_chunk: int | None
    tokens: TokenLosses | None
    partition: Partition
    checkpoint: Path | None
    progress: Reported

    def __call__(self, solutions: Tensor, /) -> BatchScores:
        """Return the scores of all examples for solutions ``(r, n)``, in the order of the data.

        Raises:
            ValueError: If there is no example, if a batch of the checkpoint is another one, or if
                batches have other numbers of tokens.
        """
        own = self.partition.all_well(lambda: self._own(solutions))
        every = {place: one for part in self.partition.gathered(own) for place, one in part.items()}
        found = [every[place] for place in sorted(every)]
        if not found:
            raise ValueError(NO_EXAMPLE)
        tokens = [one.tokens for one in found if one.tokens is not None]
        if len({part.shape[2] for part in tokens}) > 1:
            raise ValueError(
                "batches have examples with other numbers of tokens: pad all examples to the same "
                "length"
            )
        return BatchScores(
            torch.cat([one.parts for one in found], -1),
            torch.cat([one.norms for one in found]),
            torch.cat(tokens, 1) if tokens else None,
            "",
        )

    def _own(self, solutions: Tensor) -> dict[int, BatchScores]:
        """Return the scores of the batches of this rank, by their place among all batches."""
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        own: dict[int, BatchScores] = {}
        with reporting(self.progress, "influence", total=total, unit="batches") as report:
            for done, batch in enumerate(self.batches):
                place = self.partition.place(done)
                if place is not None:
                    own[place] = self._of_place(place, batch, solutions)
                if report is not None:
                    report(done + 1)
        return own

    def _of_place(self, place: int, batch: Any, solutions: Tensor) -> BatchScores:
        if self.checkpoint is None:
            return self._of_batch(batch, solutions, "")
        file, key = self.checkpoint / f"batch-{place:06d}.npz", of_batches([batch])
        make = partial(self._of_batch, batch, solutions, key)
        found: BatchScores = stored(
            file, key, make, exists=file.exists(), writes=self.partition.writes
        )
        return found

    def _of_batch(self, batch: Any, solutions: Tensor, key: str) -> BatchScores:
        space = space_of(self.params)
        parts, norms = [], []
        for block in example_gradients(
            self.loss, self.params, batch, examples_per_chunk=self.examples_per_chunk
        ):
            rows = space.ravel(block, dtype=rows_dtype(space))
            norms.append(space.norms(rows))
            parts.append(_by_leaf(space, solutions, rows).cpu())
        whole, tokens = torch.cat(parts, -1), None
        if self.tokens is not None:
            tokens = token_scores(self.tokens, self.params, batch, solutions, whole.sum(0))
        return BatchScores(whole, torch.cat(norms).cpu(), tokens, key)


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
            f"{file} was computed from other parameters, data or options: pass the same arguments, "
            "or another directory as checkpoint"
        )
    return found


def _by_leaf(space: Space, rows: Tensor, others: Tensor) -> Tensor:
    """Return the inner products of rows for each leaf, float64 ``(leaves, j, k)``."""
    pairs = zip(rows.split(space.sizes, 1), others.split(space.sizes, 1), strict=True)
    return torch.stack([gram(one, two, run=_RUN) for one, two in pairs])
