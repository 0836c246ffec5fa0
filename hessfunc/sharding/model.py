"""Models with divided parameters as pure functions, which each rank evaluates on its own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hessfunc.autograd.collectives import counted_once, joined
from hessfunc.autograd.functorch import transforming
from hessfunc.autograd.overrides import current
from hessfunc.autograd.streams import Streams
from hessfunc.changes import note_read
from hessfunc.containers import batch_leaves, is_array, mapped, opened
from hessfunc.fingerprints import checksum
from hessfunc.ranks import Ranks
from hessfunc.selection import first_of
from hessfunc.sharding.parts import Divided, evaluating, placement_of
from hessfunc.trees import Tree


class Shards(Mapping[str, Tensor]):
    """Parameters of which only a `ShardedModel` can read this rank's shards.

    Attributes:
        tensors: Shard of each parameter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(
            "the outputs of the loss read parameters besides `model_fn`, but each rank has only a "
            "part of them: compute with `model_fn(params, inputs)` alone, or pass a plain loss "
            "`(params, batch) -> scalar`, whose params are DTensors"
        )

    __getitem__ = __iter__ = __len__ = __contains__ = keys = items = values = get = _refuse


class _Question(Shards):
    """Parameters that a `ShardedModel` answers with itself, before it computes anything."""


class _Answer(BaseException):
    """Not an error: the model that was asked for, which ends the evaluation of its loss."""

    def __init__(self, model: ShardedModel) -> None:
        self.model = model


def model_in(outputs: Callable[[Tree, Any], Any], batch: Any, /) -> ShardedModel | None:
    """Return the sharded model to which a function passes its parameters, if there is one."""
    try:
        outputs(_Question({}), batch)
    except _Answer as answer:
        return answer.model
    except Exception:
        # Another function reads its parameters. The evaluation at these raises its own errors.
        return None
    return None


@dataclass(frozen=True, eq=False)
class ShardedModel:
    """Pure function ``(params, inputs) -> outputs`` of a model with divided parameters.

    Each rank evaluates its own rows of the inputs, and the rows of the outputs are joined. Outputs
    that are parameters, such as the weight of a head, are returned whole.

    Attributes:
        evaluate: Function of the whole parameters outside of blocks, and of inputs.
        parts: Division of the model.
        verified: Functions, with the shapes of their rows, whose rows are known to be independent;
            added by `refuse_coupled`.
    """

    evaluate: Callable[..., Any]
    parts: Divided
    verified: set[Any] = field(default_factory=set, repr=False)

    def __call__(self, params: Tree, /, *inputs: Any, **named_inputs: Any) -> Any:
        if isinstance(params, _Question):
            raise _Answer(self)
        if isinstance(params, Shards):
            return self.of_rank(params.tensors, *inputs, **named_inputs)
        ranks, given = self.parts.ranks, (inputs, named_inputs)
        shards = self._shards_of(params)
        self.refuse_different(given)

        def of_rows(given: Any) -> list[Tensor]:
            outputs, wholes = self._evaluated(shards, *given)
            return [leaf for leaf in _tensors(outputs) if not _is_one_of(leaf, wholes)]

        self.refuse_coupled(self.evaluate, of_rows, given)
        rows = self.rows(given)
        own = rows[ranks.rank]
        outputs, wholes = self._evaluated(shards, *rows_of(given, own))
        lengths = [len(of_rank) for of_rank in rows]

        def join(leaf: Tensor) -> Tensor:
            if _is_one_of(leaf, wholes):
                return counted_once(ranks, leaf)
            if leaf.dim() == 0 or len(leaf) != max(1, len(own)):
                raise ValueError(
                    f"an output of the model has shape {tuple(leaf.shape)} for {max(1, len(own))} "
                    "examples, but outputs of a sharded model are joined along their first axes, "
                    "which are the examples: compute means and losses in the criterion"
                )
            return joined(ranks, lengths, leaf[: len(own)])

        return mapped(join, outputs, "outputs")

    def rows(self, batch: Any, /) -> list[range]:
        """Return the rows of a batch that each rank evaluates."""
        return self.parts.ranks.parts(count_of(batch))

    def has(self, params: Tree, /) -> bool:
        """Return whether these are parameters of the model, divided like its own."""
        whole = self.parts.whole
        return isinstance(params, Mapping) and all(
            name in whole
            and isinstance(leaf, DTensor)
            and leaf.device_mesh.ndim == 1
            and leaf.placements == (placement_of(whole[name][1]),)
            for name, leaf in params.items()
        )

    def _shards_of(self, params: Tree) -> dict[str, Tensor]:
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params is a {type(params).__name__}, not a dict of named parameters: pass the "
                "params of `model_fn, params = functional(model, mesh=mesh)`"
            )
        return {name: _local(name, self.parts, leaf) for name, leaf in params.items()}

    def refuse_different(self, batch: Any, /) -> None:
        """Raise on every rank if ranks have different batches; not checked inside transforms."""
        if not transforming():
            tensors = [x for x in batch_leaves(batch) if isinstance(x, Tensor)]
            self.parts.everyone.alike({"the whole batch": checksum(tensors)})

    def refuse_coupled(self, key: Any, outputs: Callable[[Any], Any], batch: Any, /) -> None:
        """Raise if the outputs of one row depend on other rows, which other ranks may have.

        Args:
            key: Function that the outputs belong to, for which batches of one shape are tried once.
            outputs: Outputs of some rows.
            batch: Whole batch, whose first two rows are evaluated together and each alone.
        """
        tensors = [x for x in batch_leaves(batch) if isinstance(x, Tensor)]
        shapes = (key, *((x.shape[1:], x.dtype) for x in tensors))
        if self.parts.ranks.size < 2 or transforming() or shapes in self.verified:
            return
        if count_of(batch) < 2:
            return
        with torch.no_grad():
            pair = _tensors(outputs(rows_of(batch, range(2))))
            alone = [_tensors(outputs(rows_of(batch, range(i, i + 1)))) for i in range(2)]
        for both, first, second in zip(pair, *alone, strict=True):
            each = torch.cat([first, second]) if first.dim() else both
            size = float(both.abs().max()) if both.numel() else 0.0
            # Models of float64 may compute in float32.
            dtypes = (both.dtype, self.parts.dtype or both.dtype, torch.float32)
            rtol = math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))
            if both.shape != each.shape or float((both - each).abs().max()) > rtol * size:
                raise ValueError(
                    "the outputs of one example depend on other examples of the batch, which other "
                    "ranks evaluate: make the examples the first axis of all inputs "
                    "(`batch_first=True`), compute means over them in the criterion, or leave out "
                    "`mesh` of `functional`"
                )
        self.verified.add(shapes)

    def of_rank(self, shards: Mapping[str, Tensor], /, *inputs: Any, **named_inputs: Any) -> Any:
        """Return the outputs of this rank's rows, given its shards of the parameters."""
        return self._evaluated(shards, inputs, named_inputs)[0]

    def _evaluated(
        self, shards: Mapping[str, Tensor], inputs: Sequence[Any], named_inputs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        """Return the outputs of some rows, and the parameters outside of blocks."""
        parts = self.parts
        fixed = {n: x for n, x in parts.own.items() if n not in shards}
        note_read(fixed.items())
        every = {**fixed, **shards}
        if parts.dtype is not None:
            every = {name: shard.to(parts.dtype) for name, shard in every.items()}
        outside = {n: every[n] for n in parts.outside}
        trained = {n: x for n, x in outside.items() if n in parts.params}
        others = {n: x for n, x in outside.items() if n not in parts.params}
        with evaluating(every), _without_draws(parts.ranks):
            wholes = parts.gathered(trained) | parts.gathered(others)
            return self.evaluate(wholes, *inputs, **named_inputs), list(wholes.values())


def _is_one_of(leaf: Tensor, tensors: Sequence[Tensor]) -> bool:
    return any(leaf is x for x in tensors)


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of outputs."""
    found = [x for x in batch_leaves(outputs) if isinstance(x, Tensor)]
    return [x for x in found if x.is_floating_point()]


def _local(name: str, parts: Divided, leaf: Tensor) -> Tensor:
    if name not in parts.own:
        raise ValueError(
            f"the model has no parameter named {name!r}: its parameters are "
            f"{first_of(sorted(parts.own))}"
        )
    if not isinstance(leaf, DTensor):
        raise TypeError(
            f"parameter {name!r} is a plain tensor, but this model is sharded: pass the DTensors "
            "of `model_fn, params = functional(model, mesh=mesh)`"
        )
    return leaf.redistribute(placements=[placement_of(parts.whole[name][1])]).to_local()


@contextmanager
def _without_draws(ranks: Ranks) -> Iterator[None]:
    """Context manager of an evaluation that must not draw random numbers on several ranks."""
    mode = current()
    streams = mode.source if mode is not None and isinstance(mode.source, Streams) else None

    def state() -> list[Tensor]:
        if streams is None:
            return [torch.random.get_rng_state()]
        return list(streams.state().values())

    before = state()
    yield
    after = state()
    changed = len(before) != len(after) or not all(map(torch.equal, before, after))
    if changed and ranks.size > 1:
        raise ValueError(
            "the model draws random numbers, such as masks of dropout, for the rows of each rank, "
            "so that the result would depend on the number of ranks: call `model.eval()` before "
            "`functional(model, mesh=mesh)`"
        )


def count_of(batch: Any, /) -> int:
    """Return the number of examples of a batch, which ranks divide.

    Raises:
        ValueError: If the batch has no array, or if the first axes of its arrays differ.
    """
    lengths = {len(x) for x in opened(batch, "batch")[0] if is_array(x) and x.ndim > 0}
    if len(lengths) != 1:
        shown = f"first axes of length {sorted(lengths)}" if lengths else "no array with an axis"
        raise ValueError(
            f"a batch is divided among ranks along the first axes of its arrays, but it has {shown}"
            ": give all arrays one first axis, the examples, and make others inside the model"
        )
    return lengths.pop()


def rows_of(batch: Any, rows: range, /) -> Any:
    """Return these rows of a batch, or its first row if there are none.

    A rank without rows evaluates the model too, because the others gather parameters from it.
    """
    start, stop = (rows.start, rows.stop) if rows else (0, 1)
    leaves, rebuilt = opened(batch, "batch")
    return rebuilt(x[start:stop] if is_array(x) and x.ndim > 0 else x for x in leaves)
