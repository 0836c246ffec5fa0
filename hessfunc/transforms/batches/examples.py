"""Examples of a batch: how many there are, and pieces of some of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hessfunc.containers import is_array, leaf_paths, opened
from hessfunc.options import validated

# Arrays that have a first axis, and a function that puts others in their place.
Rows: TypeAlias = tuple[list[Any], Callable[[Sequence[Any]], Any]]


@validated
def examples(batch: Any, /) -> int:
    """Return the number of examples of a batch: the length that all of its arrays share.

    Counted are the first axes of tensors and NumPy arrays, wherever they lie in the batch, and the
    sequences of a PackedSequence. Numbers, text and tensors without an axis do not count.

    Raises:
        TypeError: The batch has an object that holds tensors and cannot be opened.
        ValueError: There is no array, or lengths differ, so that the number would be a guess.
    """
    lengths = _lengths(batch)
    if not lengths:
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no tensor whose first axis counts its "
            "examples: pass `weight=`, a function of the batch, such as `weight=lambda batch: 1`"
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the number of examples is a guess where first axes differ: {_told(lengths)}. Pass "
            f"what the loss is a mean over, such as `weight=lambda batch: {_likely(lengths)}`"
        )
    return next(iter(lengths.values()))


def _lengths(batch: Any) -> dict[str, int]:
    """Return the length of each array of a batch, by the expression that reaches it."""
    found, _ = opened(batch, "batch", is_leaf=_is_counted)
    lengths = [_length(leaf) for leaf in found]
    if len(set(lengths) - {None}) < 2:
        # Paths take longer than all the rest, and are for messages.
        names = list(map(str, range(len(found))))
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
    """Whether a value has a length of its own: packed sequences, and a list of 0-d tensors.

    Such a list holds a target for each example, whose inputs may be a list of tensors, too.
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
    """Return the count that is likely meant: of the targets, by their name or as the last."""
    named = [n for n in lengths if re.search(r"label|target|\by\b", n)]
    return f"len({(named or list(lengths))[-1]})"


@validated
def microbatches(batch: Any, size: int, /) -> list[Any]:
    """Cut a batch into pieces of at most ``size`` examples, each of the same structure.

    Tensors and NumPy arrays are cut along their first axis, as views, in whatever containers and
    objects they lie; lists of text or numbers with an entry for each example are cut too. All
    else is repeated. Pass the pieces to `over_batches` when the graph of the whole batch does not
    fit in memory.

    Raises:
        TypeError: The batch has an object that holds tensors and cannot be opened or copied.
        ValueError: ``size`` is not positive, arrays differ in their number of examples, or the
            batch has a PackedSequence, which has no examples one after another.
    """
    if size < 1:
        raise ValueError(f"size={size}: a microbatch has at least one example")
    rows, build = rows_of(batch)
    lengths = Counter(map(len, rows))
    if len(lengths) != 1 or lengths.keys() != set(_lengths(batch).values()):
        what = _told(_lengths(batch)) or f"a {type(batch).__name__} has no tensor"
        raise ValueError(
            f"a batch is cut along first axes of one length, and has {what}: cut it yourself, and "
            "pass the pieces to `over_batches`"
        )
    (count,) = lengths
    columns, build = rows_of(batch, columns_of=count)
    return [
        build([column[start : start + size] for column in columns])
        for start in range(0, count, size)
    ]


def rows_of(batch: Any, /, *, what: str = "batch", columns_of: int | None = None) -> Rows:
    """Return the arrays of a batch that have a first axis, and a function that replaces them.

    Args:
        batch: Batch, or outputs of a model.
        what: Name of it for messages.
        columns_of: Number of examples; lists of so many texts or numbers are arrays then.

    Raises:
        ValueError: The batch has a PackedSequence.
    """

    def is_leaf(leaf: Any) -> bool:
        return _is_packed(leaf) or (columns_of is not None and _is_column(leaf, columns_of))

    found, rebuilt = opened(batch, what, is_leaf=is_leaf)
    if any(map(_is_packed, found)):
        raise ValueError(
            "a PackedSequence cannot be cut: pack the sequences inside of the model, from a padded "
            "tensor and the lengths of its examples"
        )
    cut = [
        i
        for i, leaf in enumerate(found)
        if (is_array(leaf) and leaf.ndim > 0) or (isinstance(leaf, list) and is_leaf(leaf))
    ]

    def build(rows: Sequence[Any]) -> Any:
        inner = list(found)
        for i, row in zip(cut, rows, strict=True):
            inner[i] = row
        return rebuilt(inner)

    return [found[i] for i in cut], build


def _is_column(leaf: Any, count: int) -> bool:
    """Whether a value is a list of texts or numbers with one for each example."""
    return (
        type(leaf) is list
        and len(leaf) == count
        and not any(isinstance(x, Tensor | list | tuple | dict) for x in leaf)
        and all(isinstance(x, str | bytes | int | float | bool | None) for x in leaf)
    )
