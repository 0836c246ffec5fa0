"""Block-diagonal matrices with one block for each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Saved
from hessfunc.autograd.constant_matrix import refusing_gradients
from hessfunc.display import Displayed
from hessfunc.kronecker.block import Block, Damping, refuse_method
from hessfunc.options import at_least, finite, flag, tree, validated
from hessfunc.spaces.of import random_like, space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree

_WITHOUT_GRAPH = (
    "a product with structured blocks keeps no graph of the parameters and the batch, so that "
    "their gradient would silently leave the product out: take the product under "
    "`torch.no_grad()`, or use `ggnvp(loss, differentiable=True)`"
)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Displayed, Saved, Mapping[str, Block]):
    """Block-diagonal matrix with one diagonal block for each parameter.

    It maps the name of a parameter to its block. Called on a tree, it is the matvec of the whole
    matrix.

    Attributes:
        blocks: Diagonal blocks by the name of the parameter, in the order of the parameters.
        space: Space of the parameters.
        constants: Parameters and tensors of the batch that require a gradient, which products
            leave out; their gradient is refused.
        biases: Name of the bias that shares the block of a weight, by the name of the weight. Such
            a block acts on the flat weight and bias together, ``(k, n)``.
    """

    blocks: Mapping[str, Block]
    space: Space
    constants: tuple[Tensor, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)

    def _headline(self) -> dict[str, object]:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in self.values()))
        trace = f"{self.trace():.6g}"
        return {"blocks": len(self), "n": self.space.n, "kinds": f"[{kinds}]", "trace": trace}

    @validated(vectors=flag)
    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return the kind, the shape, the dimension and the trace of each block, by name.

        The factors are left out.

        Args:
            vectors: Accepted as for other results; nothing here is a vector.
        """
        return {"kind": "Blocks", "blocks": {name: b.to_dict() for name, b in self.items()}}

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        return {
            "block": list(self),
            "kind": [type(block).__name__ for block in self.values()],
            "shape": [tuple(block.shape) for block in self.values()],
            "n": [block.n for block in self.values()],
            "trace": [block.trace() for block in self.values()],
        }

    def __getitem__(self, name: str) -> Block:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def diagonals(self) -> tuple[str, ...]:
        """Names of the parameters whose block is a diagonal matrix."""
        return tuple(name for name, block in self.blocks.items() if block.is_diagonal)

    def __call__(self, block: Tree, /) -> Tree:
        return self._each(block, lambda part, rows: part.matvec(rows))

    @validated(block=tree)
    def inverse_matvec(self, block: Tree, damping: float, /, *, method: Damping = "exact") -> Tree:
        """Return ``(A + damping I)^-1`` times a vector block, as in `Block.inverse_matvec`."""
        return self._each(
            block, lambda part, rows: part.inverse_matvec(rows, damping, method=method)
        )

    @validated
    def inverse(self, damping: float, /, *, method: Damping = "exact") -> Matvec:
        """Return the matvec of ``(A + damping I)^-1``, for instance as a preconditioner.

        Args:
            damping: Number that is added to each eigenvalue.
            method: Method as in `Block.inverse_matvec`.
        """
        refuse_method(method, damping)
        return lambda block: self.inverse_matvec(block, damping, method=method)

    @validated(block=tree, exponent=finite)
    def power_matvec(self, block: Tree, exponent: float, damping: float = 0.0, /) -> Tree:
        """Return ``(A + damping I)^exponent`` times a vector block, as in `Block.power_matvec`."""
        return self._each(block, lambda part, rows: part.power_matvec(rows, exponent, damping))

    @validated
    def sample(self, k: int, /, damping: float = 0.0, *, seed: int) -> Tree:
        """Draw a block of k vectors from N(0, (A + damping I)^-1), as in `Block.sample`.

        The parts of a vector that belong to different blocks are independent.

        Raises:
            ValueError: If ``k`` is less than 1, or if A + damping I is not positive definite.
        """
        at_least(1, k=k)
        draws = random_like(self._like(), k, kind="normal", seed=seed)
        return self.power_matvec(draws, -0.5, damping)

    def trace(self) -> float:
        """Return the trace of the whole matrix."""
        return math.fsum(part.trace() for part in self.blocks.values())

    def norm(self) -> float:
        """Return the Frobenius norm of the whole matrix."""
        return math.hypot(*(part.norm() for part in self.blocks.values()))

    def diagonal(self) -> Tree:
        """Return the diagonal as a tree with the shapes of the parameters."""
        parts = self._separated({name: part.diagonal()[None] for name, part in self.items()})
        return self.space.tree(parts[name][0] for name in self.space.names)

    def eigenvalues(self) -> Tensor:
        """Return all n eigenvalues of the whole matrix in descending order."""
        values = [part.eigenvalues() for part in self.blocks.values()]
        return torch.cat(values).sort(descending=True).values

    @validated
    def logdet(self, damping: float = 0.0, /) -> float:
        """Return ``log det (A + damping I)`` of the whole matrix."""
        return math.fsum(part.logdet(damping) for part in self.blocks.values())

    def _saved(self) -> dict[str, Any]:
        leaves = dict(zip(self.space.names, self.space.tree_leaves(self._like()), strict=True))
        shapes = {name: list(leaf.shape) for name, leaf in leaves.items()}
        return {"blocks": dict(self.blocks), "shapes": shapes, "biases": dict(self.biases)}

    @classmethod
    def _loaded(cls, values: dict[str, Any]) -> Blocks:
        blocks: dict[str, Block] = values["blocks"]
        zero = next(iter(blocks.values()))._like.new_zeros(())
        like = {name: zero.expand(shape) for name, shape in values["shapes"].items()}
        return cls(blocks, space_of(like), (), values["biases"])

    def _each(self, block: Tree, fn: Callable[[Block, Tensor], Tensor]) -> Tree:
        leaves = dict(zip(self.space.names, self.space.block_leaves(block), strict=True))
        made = self._separated({name: fn(self[name], rows) for name, rows in self._joined(leaves)})
        outs = [made[name] for name in self.space.names]
        if self.constants and torch.is_grad_enabled():
            outs = list(refusing_gradients(self.constants, outs, _WITHOUT_GRAPH))
        return self.space.tree(outs)

    def _joined(self, leaves: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the vectors of each block, from the vectors of each parameter, by name."""
        for name in self.blocks:
            if (bias := self.biases.get(name)) is None:
                yield name, leaves[name]
            else:
                yield name, torch.cat([leaves[name].flatten(1), leaves[bias].flatten(1)], 1)

    def _separated(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vectors of each parameter, from the vectors of each block."""
        shapes = dict(zip(self.space.names, self.space.shapes, strict=True))
        parts: dict[str, Tensor] = {}
        for name, rows in vectors.items():
            if (bias := self.biases.get(name)) is None:
                parts[name] = rows
                continue
            sizes = [torch.Size(shapes[each]).numel() for each in (name, bias)]
            weights, others = rows.split(sizes, 1)
            parts[name] = weights.reshape(-1, *shapes[name])
            parts[bias] = others.reshape(-1, *shapes[bias])
        return parts

    def _like(self) -> Tree:
        """Return a tree like the parameters, without memory of its own."""
        zero = next(iter(self.blocks.values()))._like.new_zeros(())
        return self.space.tree(zero.expand(shape) for shape in self.space.shapes)
