"""Products of a matvec with flat rows, counted and checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from hessfunc.autograd.functorch import transforming
from hessfunc.memory import Footprint
from hessfunc.options import of_numpy
from hessfunc.options.door import memory_limit_now
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree, leaves

# Number of products of a run whose blocks are compared before and after. A matvec that writes into
# its block does so from the first product on.
_PRODUCTS_LOOKED_AT = 2
# Number of entries of a block that are copied for that comparison.
_SAMPLED = 2**16
CHANGES_ITS_BLOCK = (
    "the matvec changes its block in place: return a new one, such as v * d instead of v.mul_(d), "
    "because the algorithm still needs the block"
)
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Cost(TypedDict):
    """Fields of every result that describe its run, as in `Result`."""

    matvecs: int
    passes: int
    reason: str
    seed: int | None


@dataclass
class Products:
    """Products of a matvec with flat rows, counted and checked.

    Attributes:
        matvec: Function from a block of vectors to the block of their products.
        space: Space of the vectors.
        matvecs: Number of products with one vector so far.
        passes: Number of calls of the matvec so far.
        keep_first: Whether to keep the first vector and its product.
        first: First vector and its product, or None.
    """

    matvec: Matvec
    space: Space
    matvecs: int = 0
    passes: int = 0
    keep_first: bool = False
    first: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        # A matvec that a function of the caller has returned, such as a draw, is checked only here.
        given: object = self.matvec
        if not callable(given):
            kind = type(given).__name__
            raise TypeError(
                f"the draw is of type {kind}, not a matvec: pass "
                "`hf.draws(curvature)(params, batches)`"
            )

    @classmethod
    def of(cls, matvec: Matvec, like: Tree, space: Space | None = None, /) -> Products:
        """Return the products of a matvec in the given space, or in the space of ``like``.

        Raises:
            ValueError: If the tree has no entries, or does not belong to the given space.
            NotImplementedError: If a transform is active.
        """
        if transforming():
            raise NotImplementedError(
                "algorithms look at numbers between products, which transforms of torch.func and "
                "torch.compile hide: run the algorithm outside of them, and differentiate its "
                "answer by `hf.attached`, or products such as `inner(v, apply(matvec, v))`"
            )
        if space is None:
            space = space_of(like)
        else:
            space.tree_leaves(like)
        if space.n == 0:
            raise ValueError(
                "the leaves of `like` have no entries, so there is no matrix: pass a tree with at "
                "least one parameter"
            )
        return cls(matvec, space)

    def __call__(self, rows: Tensor, /) -> Tensor:
        """Return the products with the rows, counted."""
        product = self.uncounted(rows)
        self.matvecs += rows.shape[0]
        self.passes += 1
        if self.keep_first and self.first is None:
            self.first = rows[0].clone(), product[0].clone()
        return product

    def uncounted(self, rows: Tensor, /) -> Tensor:
        """Return the products with the rows, without counting them.

        Raises:
            ValueError: If the matvec writes into its block, or if its product has another
                structure than the block.
            FloatingPointError: If a product is not finite.
            MemoryError: If the first product takes more than half of `memory_limit`.
        """
        version = None if rows.is_inference() else rows._version
        # A write through NumPy or `.data` leaves the version unchanged, so compare the entries too.
        before = _bits(rows) if self.passes < _PRODUCTS_LOOKED_AT else None
        images = self.space.on_all(lambda: self._limited(rows))
        product = self._ravelled(images, rows.dtype)
        del images
        moved = version is not None and rows._version != version
        if moved or (before is not None and not _same_bits(before, rows)):
            raise ValueError(CHANGES_ITS_BLOCK)
        if product.shape[0] != rows.shape[0]:
            raise ValueError(
                f"the matvec returned {len(product)} products for a block of {len(rows)} vectors: "
                "return one product per vector, along the first axis of each leaf"
            )
        # One sum is a fast test: it is finite if all entries are, unless it overflows.
        if not math.isfinite(self.space.summed(product.sum())):
            refuse_infinite(self.space, product, "a product", FloatingPointError)
        return product

    def _ravelled(self, images: Tree, dtype: torch.dtype) -> Tensor:
        """Return a block of products as flat rows."""
        try:
            # Algorithms are not differentiated, so the graph of a product is not needed.
            with torch.no_grad():
                return self.space.ravel(images, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the matvec's product is not like its block: {error}") from None
        except RuntimeError as error:
            layouts = {leaf.layout for leaf in leaves(images)} - {torch.strided}
            if not layouts:
                raise
            raise TypeError(
                f"the matvec's product has the layout {layouts.pop()}: return a dense tensor, "
                "`product.to_dense()`"
            ) from error

    def _limited(self, rows: Tensor) -> Tree:
        limit = memory_limit_now()
        if limit is None or self.passes:
            return self._images(rows)
        with Footprint() as footprint:
            images = self._images(rows)
        if 2 * footprint.peak > limit:
            raise MemoryError(
                f"a product with {len(rows)} vectors takes {footprint.peak / 1e9:.3g} GB, more "
                f"than half of memory={limit:.3g}: pass smaller batches by "
                "`over_batches(...)(params, microbatches(batch, size))`, recompute layers by "
                "`functional(model, recompute=...)`, or pass a smaller `block_size` or `chunk_size`"
            )
        return images

    def _images(self, rows: Tensor) -> Tree:
        """Return the products with the rows as a block, with clearer errors of wrong functions."""
        try:
            return self.matvec(self.space.unravel(rows))
        except TypeError as error:
            if (clearer := of_numpy(error)) is not None:
                raise clearer from error
            # The signature is inspected only after a failure, as it takes as long as a product.
            if _is_of_params_and_batch(self.matvec):
                raise TypeError(
                    "this function of (params, batch) is no matvec: call a curvature function to "
                    "get one, such as `hvp(loss)(params, batch)`"
                ) from error
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            if not self.passes and (remedy := self._remedy(rows[0], error)) is not None:
                raise TypeError(
                    f"the matvec multiplies one vector, but not a block of them ({error}): {remedy}"
                ) from error
            raise

    def _remedy(self, row: Tensor, error: Exception) -> str | None:
        """Return the advice for a function of one vector, None if the matvec is no such function.

        It is called after an error with a block.
        """
        if isinstance(error, torch.OutOfMemoryError | NotImplementedError):
            return None
        try:
            product = self.matvec(self.space.unravel(row))
            if any(isinstance(leaf, np.ndarray) for leaf in leaves(product)):
                return "pass hessfunc.compat.from_numpy(f, n=n), as it returns an array of NumPy"
            self.space.ravel_leaves([x[None] for x in self.space.tree_leaves(product)])
        except Exception:  # The function may be of anybody, and the first error is raised again.
            return None
        return (
            "pass hessfunc.batched(f), or write it for a leading axis of vectors, such as "
            "`block @ A` for a symmetric A"
        )

    def cost(self, reason: str, seed: int | None) -> Cost:
        """Return the fields of every result that describe its run."""
        return Cost(matvecs=self.matvecs, passes=self.passes, reason=reason, seed=seed)


def _bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sample of the entries of a block and the sum of all, reinterpreted as integers."""
    sample = rows[:, :: max(1, rows.numel() // _SAMPLED)].clone()
    words = _WORDS[rows.itemsize]
    return sample.view(words), rows.sum().view(words)


def _same_bits(before: tuple[Tensor, Tensor], rows: Tensor) -> bool:
    """Return whether the rows have the bits of `_bits` from before."""
    return all(torch.equal(*pair) for pair in zip(before, _bits(rows), strict=True))


def _is_of_params_and_batch(matvec: object) -> bool:
    """Return whether a function can be called with two arguments, but not with one."""
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
    """Raise an error that names the leaves with NaN or infinite entries, if there are any.

    Args:
        space: Space of the rows.
        rows: Rows to be checked.
        what: Noun phrase for the rows, for the message.
        kind: Class of the error.
    """
    columns = torch.nonzero(~torch.isfinite(rows).all(0)).flatten()
    if names := space.leaf_of_columns(columns):
        raise kind(f"{what} has entries that are NaN or infinite, at {', '.join(names[:4])}")
