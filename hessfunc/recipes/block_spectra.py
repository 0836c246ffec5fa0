"""Spectra of the diagonal blocks of a curvature matrix, computed one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hessfunc import options
from hessfunc.algorithms.density import slq
from hessfunc.algorithms.results import Density
from hessfunc.display import Displayed, Reported, plain, reporting
from hessfunc.losses import LossFunction, hold
from hessfunc.selection import Pattern, split
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.batches.sums import Keep
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import Matvec, Tree

# Number of blocks whose results the summary of all blocks shows.
_SHOWN = 6


class BlockSpectra(Displayed, dict[str, Any]):
    """Results by the name of the block, in the order of the blocks; a dict of results."""

    def _headline(self) -> dict[str, object]:
        return {"blocks": len(self), **dict(list(self.items())[:_SHOWN])}

    def __repr__(self) -> str:
        """Return the number of blocks, and one line for each of the first blocks."""
        lines = (f"    {name}={text}" for name, text in self._summary().items())
        return "\n".join(["BlockSpectra(", *lines, ")"])

    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return the blocks as plain Python, by name, as `Result.to_dict` does for each.

        Args:
            vectors: Whether trees with the structure of the parameters are included.
        """
        return {"kind": "BlockSpectra", "blocks": plain(dict(self), vectors=vectors)}

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        tables = {name: _table(result) for name, result in self.items()}
        names = dict.fromkeys(name for table in tables.values() for name in table)
        rows = {name: len(next(iter(table.values()))) for name, table in tables.items()}
        columns: dict[str, list[Any]] = {
            "block": [name for name, count in rows.items() for _ in range(count)]
        }
        for column in names:
            columns[column] = [
                value
                for name, table in tables.items()
                for value in table.get(column, [None] * rows[name])
            ]
        return columns


def _table(result: Any) -> Mapping[str, Sequence[Any]]:
    """Return the columns of a result; an algorithm of the user's own may return anything."""
    return result._columns() if isinstance(result, Displayed) else {"value": [plain(result)]}


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
    keep: Keep = False,
    curvature: Callable[[Any], Curvature] = hvp,
    algorithm: Callable[[Matvec, Tree], Any] = _density,
    callback: Callable[[str, Any], object] | None = None,
    progress: Reported = None,
) -> BlockSpectra:
    """Compute the spectrum of each diagonal block of a curvature matrix, for example of each layer.

    A diagonal block is the curvature matrix of the loss with all other parameters held fixed. The
    spectra of the blocks of a transformer differ widely, and adaptive optimisers profit from this.

    Examples:
        >>> loss = lambda p, batch: p["a"].square().sum() + 5 * p["b"].square().sum()
        >>> params = {"a": torch.ones(4), "b": torch.ones(3)}
        >>> spectra = hf.block_spectra(loss, params, [torch.zeros(1)], blocks=["a", "b"])
        >>> {name: density.n for name, density in spectra.items()}
        {'a': 4, 'b': 3}

    Args:
        loss: Loss as a function of all parameters.
        params: Parameters at which the curvature is taken.
        batches: Any re-iterable of batches. The curvature is their mean, weighted by examples.
        blocks: Mapping from the name of a block to the pattern of its leaves, as in `split`, or
            patterns only. By default each leaf that has entries is a block.
        weight: Weight of a batch in the mean, as in `over_batches`; for a language model, its
            number of tokens.
        keep: Whether the graphs of all batches are kept while a block is computed.
        curvature: Function from a loss to its curvature function, such as `hvp` or `ggnvp`.
        algorithm: Function ``(matvec, like) -> result``, such as
            ``functools.partial(lanczos, k=5)``. The default is `slq` with one probe of 50 steps.
        callback: Function called with the name and the result of each block once it is computed.
        progress: Function of a `Progress`, called after each block; True for a bar or lines, as in
            `RunOptions`.

    Returns:
        Dict with the result of each block, in the order of the blocks.

    Raises:
        ValueError: If a pattern matches no leaf.

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
    # Match all patterns first, so that a wrong pattern raises before any block is computed.
    parts = {name: split(params, pattern) for name, pattern in patterns.items()}
    results = BlockSpectra()
    with reporting(progress, "block_spectra", total=len(parts), unit="blocks") as report:
        for name, (chosen, rest) in parts.items():
            matvec = over_batches(curvature(hold(loss, rest)), weight=weight, keep=keep)(
                chosen, batches
            )
            results[name] = algorithm(matvec, chosen)
            if report is not None:
                report(len(results))
            if callback is not None:
                callback(name, results[name])
    return results
