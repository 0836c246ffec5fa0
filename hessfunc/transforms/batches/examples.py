"""Count the examples of a batch, and divide a batch into microbatches."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hessfunc.containers import is_array, leaf_paths, opened
from hessfunc.options import validated

# Arrays that have a first axis, and a function that rebuilds the batch from other arrays.
Rows: TypeAlias = tuple[list[Any], Callable[[Sequence[Any]], Any]]


@validated
def examples(batch: Any, /) -> int:
    """Return the number of examples of a batch, which is the common length of its arrays.

    The length of a tensor or NumPy array, anywhere in the batch, is that of its first axis. The
    length of a PackedSequence is its number of sequences. Numbers, text and tensors without an
    axis are ignored.

    Raises:
        TypeError: If the batch has an object that holds tensors and cannot be opened.
        ValueError: If the batch has no array, or if lengths differ.
    """
    lengths = _lengths(batch)
    if not lengths:
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no tensor whose first axis counts its "
            "examples: pass a function of the batch as weight, such as `weight=lambda batch: 1`"
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the number of examples is a guess where first axes differ: {_told(lengths)}. Pass "
            f"the number that the loss averages over, such as `weight=lambda batch: "
            f"{_likely(lengths)}`"
        )
    return next(iter(lengths.values()))


def _lengths(batch: Any) -> dict[str, int]:
    """Return the length of each array of a batch, by the expression that reaches the array."""
    leaves, _ = opened(batch, "batch", is_leaf=_is_counted)
    lengths = [_length(leaf) for leaf in leaves]
    if len(set(lengths) - {None}) < 2:
        # Expressions are slow to build, and only needed in the message about different lengths.
        names = list(map(str, range(len(leaves))))
    else:
        names = leaf_paths(batch, "batch", is_leaf=_is_counted)
    return {name: length for name, length in zip(names, lengths, strict=True) if length is not None}


def _length(leaf: Any) -> int | None:
    if _is_packed(leaf):
        return int(leaf.batch_sizes[0]) if len(leaf.batch_sizes) else 0
    if isinstance(leaf, list):
        return len(leaf) if _is_counted(leaf) else None
    return len(leaf) if is_array(leaf) and leaf.ndim > 0 else None


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence)


def _is_counted(leaf: Any) -> bool:
    """Return whether a value counts as one array: a PackedSequence or a list of 0-d tensors.

    Such a list holds one target per example. The inputs may then be a list of tensors too.
    """
    return _is_packed(leaf) or (
        isinstance(leaf, list)
        and len(leaf) > 1
        and all(isinstance(x, Tensor) and x.ndim == 0 for x in leaf)
    )


def _told(lengths: dict[str, int]) -> str:
    shown = [f"{length} of {name}" for name, length in list(lengths.items())[:4]]
    return ", ".join(shown) + ", ..." * (len(lengths) > 4)


def _likely(lengths: dict[str, int]) -> str:
    """Return code for the likely number of examples: the length of the targets.

    Targets are recognised by their name; otherwise the last array is chosen.
    """
    named = [n for n in lengths if re.search(r"label|target|\by\b", n)]
    return f"len({(named or list(lengths))[-1]})"


@validated
def microbatches(batch: Any, size: int, /) -> list[Any]:
    """Divide a batch into microbatches of at most ``size`` examples, with the same structure.

    Tensors and NumPy arrays in any containers or objects are divided along their first axis, as
    views. Lists of text or numbers with one entry per example are divided too. Everything else is
    repeated. Pass the microbatches to `over_batches` if the graph of the whole batch does not fit
    in memory.

    Examples:
        >>> batch = torch.arange(5), torch.arange(5)
        >>> [len(inputs) for inputs, targets in hf.microbatches(batch, 2)]
        [2, 2, 1]

    Args:
        batch: Batch to divide.
        size: Largest number of examples of a microbatch.

    Raises:
        TypeError: If the batch has an object that holds tensors and cannot be opened or copied.
        ValueError: If ``size`` is not positive, if arrays differ in their number of examples, or
            if the batch has a PackedSequence, which cannot be divided.
    """
    if size < 1:
        raise ValueError(f"size={size}: a microbatch has at least one example, such as size=1")
    lengths = _lengths(batch)
    if len(set(lengths.values())) != 1:
        shown = _told(lengths) or f"no tensor in a {type(batch).__name__}"
        raise ValueError(
            f"a batch is divided along first axes of equal length, but this batch has {shown}: "
            "divide it yourself, and pass the list to `over_batches`"
        )
    count = next(iter(lengths.values()))
    columns, build = rows_of(batch, columns_of=count)
    return [
        build([column[start : start + size] for column in columns])
        for start in range(0, count, size)
    ]


def rows_of(batch: Any, /, *, what: str = "batch", columns_of: int | None = None) -> Rows:
    """Return the arrays of a batch that have a first axis, and a function that replaces them.

    Args:
        batch: Batch, or outputs of a model.
        what: Name of the batch for messages.
        columns_of: Number of examples. If given, lists of that many texts, numbers or tensors
            without an axis count as arrays.

    Raises:
        ValueError: If the batch has a PackedSequence, or a tensor that is sparse or nested.
    """

    def is_leaf(leaf: Any) -> bool:
        is_list = columns_of is not None and (_is_counted(leaf) or _is_column(leaf, columns_of))
        return is_list or _is_packed(leaf)

    leaves, rebuilt = opened(batch, what, is_leaf=is_leaf)
    if any(isinstance(leaf, Tensor) and leaf.layout is not torch.strided for leaf in leaves):
        raise ValueError(
            f"the {what} has a tensor that is sparse or nested and cannot be divided along its "
            "first axis: pass a dense one, `x.to_dense()`"
        )
    if any(map(_is_packed, leaves)):
        raise ValueError(
            "a PackedSequence cannot be divided: pass a padded tensor and the lengths, and call "
            "`pack_padded_sequence` inside the model"
        )
    cut = [
        i
        for i, leaf in enumerate(leaves)
        if (is_array(leaf) and leaf.ndim > 0) or (isinstance(leaf, list) and is_leaf(leaf))
    ]

    def build(rows: Sequence[Any]) -> Any:
        inner = list(leaves)
        for i, row in zip(cut, rows, strict=True):
            inner[i] = row
        return rebuilt(inner)

    return [leaves[i] for i in cut], build


def _is_column(leaf: Any, count: int) -> bool:
    """Return whether a value is a list of texts or numbers with one entry per example."""
    return (
        type(leaf) is list
        and len(leaf) == count
        and not any(isinstance(x, Tensor | list | tuple | dict) for x in leaf)
        and all(isinstance(x, str | bytes | int | float | bool | None) for x in leaf)
    )
