"""Products of a matvec with flat rows, counted and checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import Tensor

from hessfunc.options import of_numpy
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree

# Of a run. A matvec that writes into its block does so from the first product on.
_PRODUCTS_LOOKED_AT = 2
# Entries of a block that are kept to be compared after a product.
_SAMPLED = 2**16
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Cost(TypedDict):
    """Fields of every result that describe its run, as in `Result`."""

    matvecs: int
    passes: int
    reason: str
    seed: int | None


@dataclass
class Products:
    """The products of a matvec with flat rows, counted and checked.

    Attributes:
        matvec: block -> block.
        space: of its vectors.
        matvecs: products with one vector so far.
        passes: calls so far.
        keep_first: keep the first vector with its product.
        first: these two.
        last: Last vector, its product and its length, where symmetry is looked at.
    """

    matvec: Matvec
    space: Space
    matvecs: int = 0
    passes: int = 0
    keep_first: bool = False
    first: tuple[Tensor, Tensor] | None = None
    last: tuple[Tensor, Tensor, float] | None = None

    def __post_init__(self) -> None:
        # What a function of the caller's has returned is checked nowhere else.
        given: object = self.matvec
        if not callable(given):
            kind = type(given).__name__
            raise TypeError(f"the draw is a {kind}, and not a matvec: take `hessfunc.draws`")

    @classmethod
    def of(cls, matvec: Matvec, like: Tree, space: Space | None = None, /) -> Products:
        """Of a matvec in the given space, or in that of ``like``."""
        if space is None:
            space = space_of(like)
        else:
            space.tree_leaves(like)
        if space.n == 0:
            raise ValueError("the leaves of the tree have no entries: there is no matrix")
        return cls(matvec, space)

    def __call__(self, rows: Tensor, /) -> Tensor:
        product = self.uncounted(rows)
        self.matvecs += len(rows)
        self.passes += 1
        if self.keep_first and self.first is None:
            self.first = rows[0].clone(), product[0].clone()
        return product

    def uncounted(self, rows: Tensor, /) -> Tensor:
        """Products that are no part of the run's cost."""
        version = None if rows.is_inference() else rows._version
        # A write through NumPy or `.data` moves no version: look for it in the first products.
        before = _bits(rows) if self.passes < _PRODUCTS_LOOKED_AT else None
        images = self.space.on_all(lambda: self._images(rows))
        product = self._ravelled(images, rows.dtype)
        del images
        moved = version is not None and rows._version != version
        if moved or (before is not None and not _same_bits(before, rows)):
            raise ValueError(
                "the matvec changes its block in place: return a new one, such as v * d instead "
                "of v.mul_(d), as the block is the algorithm's own memory"
            )
        if len(product) != len(rows):
            raise ValueError(f"the matvec gave {len(product)} products of {len(rows)} vectors")
        # The sum is finite where all entries are, but for an overflow, and fast.
        if not self.space.summed(product.sum()).isfinite():
            refuse_infinite(self.space, product, "a product", FloatingPointError)
        return product

    def _ravelled(self, images: Tree, dtype: torch.dtype) -> Tensor:
        try:
            # No gradient is taken through an algorithm, whatever graph a product carries.
            with torch.no_grad():
                return self.space.ravel(images, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the matvec's product is not like its block: {error}") from None

    def _images(self, rows: Tensor) -> Tree:
        try:
            return self.matvec(self.space.unravel(rows))
        except TypeError as error:
            if (clearer := of_numpy(error)) is not None:
                raise clearer from error
            # Looked at only now: a signature takes as long as a small product.
            if _is_of_params_and_batch(self.matvec):
                raise TypeError(
                    "this is a curvature function or a loss, and no matvec: call a curvature "
                    "function with (params, batch) to get one, `hvp(loss)(params, batch)`"
                ) from error
            raise

    def cost(self, reason: str, seed: int | None) -> Cost:
        """Return the fields of every result that describe its run."""
        return Cost(matvecs=self.matvecs, passes=self.passes, reason=reason, seed=seed)


def _bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A sample of the entries of a block, and the sum of all, both in their bits as integers."""
    sample = rows[:, :: max(1, rows.numel() // _SAMPLED)].clone()
    words = _WORDS[rows.itemsize]
    return sample.view(words), rows.sum().view(words)


def _same_bits(before: tuple[Tensor, Tensor], rows: Tensor) -> bool:
    return all(torch.equal(*pair) for pair in zip(before, _bits(rows), strict=True))


def _is_of_params_and_batch(matvec: object) -> bool:
    """Whether it can be called with two arguments, and not with one."""
    try:
        signature = inspect.signature(cast("Callable[..., object]", matvec))
        signature.bind(None, None)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False


def refuse_infinite(space: Space, rows: Tensor, what: str, kind: type[Exception], /) -> None:
    """Raise where entries are not finite, with the leaves in which they lie."""
    columns = torch.nonzero(~torch.isfinite(rows).all(0)).flatten()
    if names := space.leaf_of_columns(columns):
        raise kind(f"{what} has entries that are NaN or infinite, at {', '.join(names[:4])}")
