"""The spectra of all blocks of a model, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.density import slq
from hessfunc.algorithms.results import Density
from hessfunc.losses import LossFunction, hold
from hessfunc.selection import split
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import Matvec, Tree

Pattern = str | Iterable[str] | Callable[[str, Tensor], bool]


def _density(matvec: Matvec, like: Tree) -> Density:
    return slq(matvec, like, probes=1, steps=50)


@options.validated(
    params=options.mapping,
    curvature=options.factory,
    callback=options.function_of(2, "(name, result)"),
)
def block_spectra(
    loss: LossFunction,
    params: Mapping[str, Any],
    batches: Iterable[Any],
    /,
    *,
    blocks: Mapping[str, Pattern] | Iterable[str] | None = None,
    weight: Callable[[Any], float] | None = None,
    keep: bool = False,
    curvature: Callable[[Any], Curvature] = hvp,
    algorithm: Callable[[Matvec, Tree], Any] = _density,
    callback: Callable[[str, Any], object] | None = None,
) -> dict[str, Any]:
    """The spectrum of each diagonal block of a curvature matrix: of each layer, say.

    Each block is that of the loss with all other parameters held fixed. Blocks of transformers
    differ widely, which is what adaptive optimisers profit from.

    Args:
        loss: of all parameters.
        params: at which the curvature is taken.
        batches: any re-iterable of batches; of several the mean weighted by examples is taken.
        blocks: the name of each block and its leaves, as patterns of `split`; or patterns alone.
            By default each leaf that has entries is a block.
        weight: what a batch counts, as in `over_batches`: for language models, its tokens.
        keep: keep the graphs of all batches while a block is worked on.
        curvature: loss -> curvature function, such as `hvp` or `ggnvp`.
        algorithm: ``(matvec, like) -> result``, such as ``functools.partial(lanczos, k=5)``; by
            default `slq` with one probe of 50 steps.
        callback: called with the name and the result of each block as soon as it is there.

    Returns:
        The result of each block, in the order of the blocks.

    Raises:
        ValueError: a pattern chooses nothing.

    Source: Zhang et al. 2024, Why transformers need Adam, arXiv 2402.16788.
    """
    patterns: Mapping[str, Pattern]
    if blocks is None:
        space = space_of(params)
        patterns = {
            name: [name] for name, size in zip(space.names, space.sizes, strict=True) if size
        }
    elif isinstance(blocks, Mapping):
        patterns = blocks
    else:
        patterns = {
            pattern: pattern for pattern in ([blocks] if isinstance(blocks, str) else blocks)
        }
    # All patterns are tried first, so that a wrong one does not wait for the others' results.
    parts = {name: split(params, pattern) for name, pattern in patterns.items()}
    found: dict[str, Any] = {}
    for name, (chosen, rest) in parts.items():
        matvec = over_batches(curvature(hold(loss, rest)), weight=weight, keep=keep)(
            chosen, batches
        )
        found[name] = algorithm(matvec, chosen)
        if callback is not None:
            callback(name, found[name])
    return found
