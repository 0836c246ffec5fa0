"""Loss landscapes: a loss on a line or a plane through the parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.results.landscape import Landscape, Normalise
from hessfunc.autograd import explained, precise, rereading
from hessfunc.containers import number_of
from hessfunc.display import Reported, reporting
from hessfunc.losses import LossFunction
from hessfunc.memory import Footprint
from hessfunc.options import at_least
from hessfunc.randomness import seeded
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.evaluation import checked
from hessfunc.trees import Tree, leaves

# Candidate numbers of points in one pass of vmap, in descending order; 1 is a loop.
_SIZES = (64, 16, 4, 1)

# Largest average number of entries that an operation may write for all points of a pass. Beyond
# it, vmap only moves the arithmetic of small operations out of the caches. Over 13 nets, the chunk
# size from this rule takes at most 1.12 times the time of the fastest size (CPU, one thread).
_ENTRIES = 2**19

# An accelerator needs larger operations to be busy.
_ACCELERATOR_ENTRIES = 2**24

# Largest memory of a pass on a CPU. It is a constant, because the free memory varies between runs.
_PASS_BYTES = 2**30

# Number of points between two calls of the callback when points are evaluated in a loop.
_IN_A_LOOP = 4


@options.validated(at=options.coordinates)
def landscape(
    loss: LossFunction,
    params: Tree,
    batches: Iterable[Any],
    /,
    *directions: Tree,
    radius: float = 1.0,
    points: int = 51,
    at: Tensor | Sequence[Tensor] | None = None,
    normalise: Normalise | None = None,
    weight: Callable[[Any], float] | None = None,
    points_per_chunk: int | None = None,
    callback: Callable[[Landscape], object] | None = None,
    progress: Reported = None,
) -> Landscape:
    """Evaluate a loss along one or two directions from ``params``, as a mean over batches.

        values_ij = sum_b weight(b) loss(params + x_i u + y_j v, b) / sum_b weight(b)

    Along a unit eigenvector of the Hessian, the second derivative at 0 is the eigenvalue. For a
    loss with kinks, such as those of ReLU, this holds only between two kinks.

    Cost: one forward pass for each point and batch, and two more to measure one pass. Without
    ``points_per_chunk``, up to 64 points go through one pass by vmap. Their number depends only on
    the sizes of the loss's operations, so that every run takes the same path.

    Examples:
        >>> loss = lambda w, x: w.square().sum()
        >>> direction = torch.tensor([1.0, 0.0])
        >>> line = hf.landscape(loss, torch.zeros(2), [torch.zeros(1)], direction, points=3)
        >>> line.values
        tensor([1., 0., 1.], dtype=torch.float64)

    Args:
        loss: Function ``(params, batch) -> scalar``. Models with BatchNorm must be in eval mode;
            dropout in train mode has the same mask at all points.
        params: Point from which the directions start.
        batches: Any iterable of batches, read once.
        directions: Directions, one or two trees like ``params`` (a gradient, a step, the difference
            to other parameters), or vector blocks with one or two vectors in total
            (``Eigenpairs.vectors``, `random_like`).
        radius: Largest coordinate: each axis reaches from -radius to radius.
        points: Number of points on each axis. An odd number places ``params`` in the middle.
        at: Strictly increasing coordinates ``(p,)`` that replace ``radius`` and ``points``, either
            one tensor for both axes or one tensor for each axis.
        normalise: Normalisation of the directions. ``"unit"`` scales each direction to unit
            length, so that coordinates are distances. ``"filter"`` scales each filter of a
            direction (a slice of a leaf along its first axis) to the length of the same filter of
            ``params``, and sets leaves with fewer than two axes (biases, norms) to zero. Nets whose
            weights differ in scale can then be compared. None leaves the directions unchanged.
        weight: Weight of a batch in the mean, as in `over_batches`.
        points_per_chunk: Number of points in one pass. 1 is a loop; None chooses it by the rule
            above.
        callback: Function called with the landscape computed so far after each chunk.
        progress: Function of a `Progress`, called after each chunk; True for a bar or lines, as in
            `RunOptions`.

    Raises:
        TypeError: If ``batches`` is a single batch.
        ValueError: If the number of directions is not one or two; if a direction is zero, not
            finite, or not shaped like ``params``; if the radius or the number of points is not
            positive; if the coordinates are not one-dimensional, finite and strictly increasing;
            if there is no batch; if the loss at ``params`` is not a finite scalar; or if a model
            uses batch statistics (BatchNorm in train mode) on more than one batch.

    Source: Goodfellow et al. 2015, arXiv 1412.6544; filter normalisation and surfaces, Li et al.
    2018, arXiv 1712.09913.
    """
    space = space_of(params)
    point = space.ravel_leaves([leaf.detach()[None] for leaf in space.tree_leaves(params)])[0]
    along = _normalised(space, _rows(space, directions), point, normalise)
    lengths = space.norms(along).to("cpu", torch.float64)
    if not bool(lengths.isfinite().all() and (lengths > 0).all()):
        raise ValueError(_not_a_direction(lengths, normalise))
    axes = _axes(at, radius, points, len(lengths))
    steps = torch.cartesian_prod(*axes).view(-1, len(axes)).to(space.device, space.dtype)
    at_least(1, points_per_chunk=points_per_chunk)
    size = points_per_chunk or 1
    total = torch.zeros(len(steps), dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(total)
    average = Average.over(weight, batches)
    evaluations = 0

    def so_far(reason: str) -> Landscape:
        return Landscape(
            values=(total if average.is_sum else total / weights).view(*map(len, axes)),
            x=axes[0],
            y=axes[1] if len(axes) > 1 else None,
            lengths=lengths,
            normalise=normalise,
            evaluations=evaluations,
            matvecs=0,
            passes=0,
            reason=reason,
            seed=None,
        )

    count = number_of(batches)
    all_points = None if count is None else count * len(steps)
    with reporting(progress, "landscape", total=all_points, unit="evaluations") as report:
        for batch in _not_single(batches):
            if not average.counts(batch):
                continue
            average.look(loss, params, batch)
            counted = average.of(batch)
            if not counted:
                # Its loss is 0 / 0 where all targets are ignored.
                continue
            value = _along(loss, space, point, along, batch, several=evaluations > 0)
            if not evaluations:
                measured = _start(value, space, params, batch, torch.zeros_like(steps[0]))
                if points_per_chunk is None:
                    size = _size_by_rule(measured, space.device)
                    size = size if _maps(value, steps[:1]) else 1
            for part, losses in _values(value, steps, size, by_rule=points_per_chunk is None):
                total[part] += counted * losses
                weights[part] += counted
                evaluations += len(losses)
                if report is not None:
                    report(evaluations)
                if callback is not None:
                    callback(so_far("running"))
    if not evaluations:
        raise ValueError(
            "no batch has a positive weight: check that `batches` is not empty or consumed"
        )
    return so_far("complete")


def _not_single(batches: Iterable[Any]) -> Iterable[Any]:
    is_pair = isinstance(batches, tuple) and len(batches) == 2 and isinstance(batches[1], Tensor)
    if isinstance(batches, (Tensor, Mapping)) or is_pair:
        raise TypeError("`batches` is a single batch: pass a list of batches, `[batch]`")
    return batches


def _rows(space: Space, directions: Sequence[Tree]) -> Tensor:
    """Return the directions as flat rows ``(d, n)``."""
    parts = []
    for direction in directions:
        first = leaves(direction)[:1]
        if first and isinstance(first[0], Tensor) and first[0].dim() == len(space.shapes[0]) + 1:
            rows = space.block_leaves(direction)
        else:
            rows = [leaf[None] for leaf in space.tree_leaves(direction)]
        parts.append(space.ravel_leaves([leaf.detach() for leaf in rows]))
    count = sum(map(len, parts))
    if count not in (1, 2):
        raise ValueError(
            f"{count} directions: a landscape has one or two; take the first vector of a larger "
            "block, `{name: leaf[:1] for name, leaf in block.items()}`"
        )
    return torch.cat(parts)


def _normalised(space: Space, rows: Tensor, point: Tensor, normalise: Normalise | None) -> Tensor:
    match normalise:
        case None:
            return rows
        case "unit":
            return rows / space.norms(rows).to(rows.dtype)[:, None]
        case "filter":
            pairs = zip(leaves(space.unravel(rows)), leaves(space.unravel(point)), strict=True)
            return space.ravel_leaves([_like_filters(d, weights) for d, weights in pairs])
    raise ValueError(f"normalise={normalise!r}: choose one of {get_args(Normalise)} or None")


def _like_filters(directions: Tensor, weights: Tensor) -> Tensor:
    """Scale each filter of each direction to the length of the same filter of the weights."""
    # d_f <- d_f |w_f| / |d_f| for each filter f, and zero for biases and norms (Li et al. 2018).
    if weights.dim() < 2:
        return torch.zeros_like(directions)
    lengths = directions.flatten(2).norm(dim=2)
    ratios = torch.where(lengths > 0, weights.flatten(1).norm(dim=1) / lengths, 0.0)
    return directions * ratios.view(*ratios.shape, *[1] * (weights.dim() - 1))


def _not_a_direction(lengths: Tensor, normalise: Normalise | None) -> str:
    bad = next(i for i, length in enumerate(lengths.tolist()) if not 0 < length < math.inf)
    if normalise == "filter" and lengths[bad] == 0:
        return (
            f"direction {bad + 1} is zero after filter normalisation, which sets biases and norms "
            "to zero: pass `normalise='unit'`"
        )
    return f"direction {bad + 1} is zero, or has entries that are NaN or infinite"


def _axes(
    at: Tensor | Sequence[Tensor] | None, radius: float, points: int, count: int
) -> list[Tensor]:
    """Return the coordinates on each axis."""
    if at is None:
        if not 0 < radius < math.inf or points < 1 or points % 1:
            raise ValueError(
                f"radius={radius}, points={points}: both must be positive, and points an integer"
            )
        # Symmetric to the last bit, so that the middle point is exactly params.
        places = torch.arange(points, dtype=torch.float64, device="cpu") - (points - 1) / 2
        at = places * (2 * radius / max(1, points - 1))
    given = [at] * count if isinstance(at, Tensor) else list(at)
    if len(given) != count:
        raise ValueError(
            f"`at` has {len(given)} axes for {count} directions: pass one tensor for each direction"
        )
    axes = [axis.detach() for axis in given]
    for axis in axes:
        if axis.dim() != 1 or not len(axis) or not axis.isfinite().all():
            raise ValueError(
                f"`at` has an axis of shape {tuple(axis.shape)}: pass a one-dimensional, non-empty "
                "tensor of finite coordinates"
            )
        if not bool((axis.diff() > 0).all()):
            raise ValueError(
                "`at` has an axis that is not strictly increasing: pass `axis.unique()`"
            )
    return axes


def _along(
    loss: LossFunction,
    space: Space,
    point: Tensor,
    along: Tensor,
    batch: Any,
    *,
    several: bool,
) -> Callable[[Tensor], Tensor]:
    """Return the loss of a batch as a function of the coordinates ``(d,)`` of a point."""

    def value(step: Tensor) -> Tensor:
        with (
            torch.no_grad(),
            rereading(batch),
            precise(space.device),
            seeded(0, space.device),
            several_batches() if several else nullcontext(),
        ):
            return loss(space.unravel(point + step @ along), batch)

    return value


def _start(
    value: Callable[[Tensor], Tensor], space: Space, params: Tree, batch: Any, origin: Tensor
) -> Footprint:
    """Check that the loss at ``params`` is a finite scalar, and measure one evaluation."""
    with explained(space, batch), Footprint() as measured:
        checked(value(origin), space, space.tree_leaves(params))
    return measured


def _size_by_rule(of_one: Footprint, device: torch.device) -> int:
    """Return the number of points in one pass, from the operations of one evaluation."""
    on_cpu = device.type == "cpu"
    entries = (_ENTRIES if on_cpu else _ACCELERATOR_ENTRIES) * max(1, of_one.operations)
    largest = _PASS_BYTES // max(1, of_one.peak) if on_cpu else _SIZES[0]
    return next(
        (size for size in _SIZES if size * of_one.entries <= entries and size <= largest), 1
    )


def _maps(value: Callable[[Tensor], Tensor], steps: Tensor) -> bool:
    """Return whether all operations of the loss have batching rules."""
    try:
        _chunk(value, steps, 2)
    except RuntimeError:
        return False
    return True


def _values(
    value: Callable[[Tensor], Tensor], steps: Tensor, size: int, *, by_rule: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the values at the given coordinates in chunks, on the CPU.

    Args:
        value: Function from the coordinates of one point to the loss at this point.
        steps: Coordinates of all points, ``(points, d)``.
        size: Number of points in one pass.
        by_rule: Whether a pass that fails may be repeated with fewer points.
    """
    start = 0
    while start < len(steps):
        part = slice(start, start + (_IN_A_LOOP if size == 1 else size))
        try:
            losses = _chunk(value, steps[part], size).to("cpu", torch.float64)
        except torch.OutOfMemoryError:
            if size == 1 or not by_rule:
                raise
            size = max(1, size // 4)
            continue
        except RuntimeError:
            # An operation has no batching rule. An error of the loss itself is raised again by
            # the loop.
            if size == 1 or not by_rule:
                raise
            size = 1
            continue
        yield part, losses
        start += len(losses)


def _chunk(value: Callable[[Tensor], Tensor], steps: Tensor, size: int) -> Tensor:
    if size == 1:
        return torch.stack([value(step) for step in steps])
    with warnings.catch_warnings():
        # Operations without a batching rule run as a loop inside vmap.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(value, randomness="same")(steps)
