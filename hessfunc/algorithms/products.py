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
from hessfunc.numerics import NonFiniteError
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
# First scaled row, and factor of every second row from there on, in the even and the odd calls.
_SCALED = (1, -2.0), (0, -4.0)
CHANGES_ITS_BLOCK = (
    "the matvec changes its block in place: return a new one, such as v * d instead of v.mul_(d), "
    "because the algorithm still needs the block"
)
# Entries of products whose fourth powers neither underflow nor overflow in float64, and of products
# in float32 whose squares do not.
LIMITS = 1e-70, 1e70
IN_FLOAT32 = 1e-17, 1e17
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

    Every second row is multiplied by -2 or -4 before the matvec, and its product divided by the
    same number. For a linear matvec, this changes no bit. Any other one looks like a matrix that is
    not symmetric: an added constant changes its sign, and so does a square.

    Attributes:
        matvec: Function from a block of vectors to the block of their products.
        space: Space of the vectors.
        matvecs: Number of products with one vector so far.
        passes: Number of calls of the matvec so far.
        keep_first: Whether to keep the first vector and its product.
        first: First vector and its product, or None.
        largest: Largest absolute entry of a product so far.
        limits: Least and largest accepted value of ``largest``, unless it is 0; None for products
            that are not squared, and are accurate at any scale.
    """

    matvec: Matvec
    space: Space
    matvecs: int = 0
    passes: int = 0
    keep_first: bool = False
    first: tuple[Tensor, Tensor] | None = None
    largest: float = 0.0
    limits: tuple[float, float] | None = LIMITS

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
        return self._counted(rows, self.uncounted(rows))

    def as_given(self, rows: Tensor, /) -> Tensor:
        """Return the products with the rows, counted, without the copy that scales some of them.

        It is for algorithms that compare no inner products, and so cannot detect a matvec that is
        not linear, and for products that are only stored.
        """
        return self._counted(rows, self._checked(rows))

    def _counted(self, rows: Tensor, product: Tensor) -> Tensor:
        self.matvecs += rows.shape[0]
        self.passes += 1
        if self.limits is not None:
            self.refuse_scale(self.limits)
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
        start, factor = _SCALED[self.passes % 2]
        if start >= len(rows):
            return self._checked(rows)
        block = rows.clone()
        block[start::2].mul_(factor)
        product = self._checked(block)
        product[start::2].div_(factor)
        return product

    def refuse_scale(self, limits: tuple[float, float], /) -> None:
        """Raise an error if squares of the products underflow or overflow.

        Args:
            limits: Least and largest accepted value of ``largest``, unless it is 0.

        Raises:
            ValueError: If ``largest`` is outside of the limits.
        """
        refuse_scale(
            self.largest,
            limits,
            "the products",
            "pass `hessfunc.matvecs.scale(matvec, {})`, and divide the eigenvalues or the trace by "
            "this number",
        )

    def _checked(self, rows: Tensor) -> Tensor:
        """Return the products with the rows, checked as `uncounted` says."""
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
        # The largest entry is NaN or infinite if any entry is.
        entries = product if product.numel() else product.new_zeros(1)
        largest = float(self.space.summed(torch.linalg.vector_norm(entries, math.inf)))
        if not math.isfinite(largest):
            refuse_infinite(self.space, product, "a product")
        self.largest = max(self.largest, largest)
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


def refuse_scale(largest: float, limits: tuple[float, float], what: str, remedy: str, /) -> None:
    """Raise an error if squares of numbers underflow or overflow.

    Args:
        largest: Largest absolute value of the numbers.
        limits: Least and largest accepted value, unless it is 0.
        what: Noun phrase for the numbers, for the message.
        remedy: Advice with a place for the factor that scales the numbers to about 1.

    Raises:
        ValueError: If the value is outside of the limits.
    """
    least, most = limits
    if largest and not least <= largest <= most:
        factor = 10.0 ** min(max(-round(math.log10(largest)), -300), 300)
        raise ValueError(
            f"the largest entry of {what} is {largest:.0e}, so that squares "
            f"{'underflow' if largest < least else 'overflow'}: {remedy.format(f'{factor:.0e}')}"
        )


def refuse_infinite(space: Space, rows: Tensor, what: str, /) -> None:
    """Raise an error that names the leaves with NaN or infinite entries, if there are any.

    Args:
        space: Space of the rows.
        rows: Rows to be checked.
        what: Noun phrase for the rows, for the message.
    """
    columns = torch.nonzero(~torch.isfinite(rows).all(0)).flatten()
    if names := space.leaf_of_columns(columns):
        raise NonFiniteError(
            f"{what} has entries that are NaN or infinite, at {', '.join(names[:4])}"
        )
