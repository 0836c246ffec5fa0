"""Curvature functions whose blocks are made from sums over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hessfunc.kronecker.block import Block
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.calls import linearising, refuse_dtensors
from hessfunc.kronecker.composite_blocks import Permuted
from hessfunc.kronecker.evaluation import Evaluation, Form, Unsupported, factor_keys
from hessfunc.kronecker.factored_blocks import Dense, DiagonalBlock, Eigenbasis, Kronecker
from hessfunc.kronecker.moments import Sharing, by_row
from hessfunc.kronecker.uses import observed
from hessfunc.losses import Loss
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.batches.statistics import Stage, Statistics
from hessfunc.transforms.hessian import requiring_gradients

# Function (outputs, batch) -> columns (c, B, ...) with sum_c u_bc u_bc' = H_b, the Hessian of the
# criterion at the outputs of example b, exactly or in expectation.
Columns: TypeAlias = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class FactoredCurvature:
    """Curvature function ``(params, batch) -> blocks`` from second moments of gradients and inputs.

    Attributes:
        loss: Loss with outputs and criterion.
        model: Module from which the loss was made.
        columns: Columns whose outer products sum to the output Hessian. None replaces the output
            factors by identity matrices.
        sharing: Treatment of positions that share a weight.
        corrected: Whether the eigenvalues are corrected, as in `ekfac`.
        exact: Whether the columns are exact, so that the rows of an example must not be mixed.
        unsupported: Treatment of parameters without Kronecker factors.
    """

    loss: Loss
    model: nn.Module
    columns: Columns | None
    sharing: Sharing
    corrected: bool = False
    exact: bool = True
    unsupported: Unsupported = "error"

    def __call__(self, params: Mapping[str, Tensor], batch: Any, /) -> Blocks:
        with self._evaluated(params, batch) as evaluation:
            factors = evaluation.factors().mean()
            bases = self.bases(evaluation.forms, factors) if self.corrected else {}
            values = evaluation.eigenvalues(bases).mean() if self.corrected else {}
        constants = tuple(requiring_gradients(list(params.values()), batch))
        return self.blocks(params, evaluation.forms, factors | bases | values, constants)

    def over_batches(
        self, params: Mapping[str, Tensor], mean: Callable[[Stage], Mapping[str, Tensor]], /
    ) -> Blocks:
        """Return the blocks of a data set, given the function that averages its statistics."""
        forms: dict[str, Form] = {}

        def factors(params: Mapping[str, Tensor], batch: Any) -> Statistics:
            with self._evaluated(params, batch) as evaluation:
                if forms and forms != evaluation.forms:
                    raise ValueError(
                        "the model uses its parameters in another way in another batch, so that "
                        "their blocks have different structures: use batches of the same kind"
                    )
                forms.update(evaluation.forms)
                return evaluation.factors()

        def eigenvalues(params: Mapping[str, Tensor], batch: Any) -> Statistics:
            with self._evaluated(params, batch) as evaluation:
                return evaluation.eigenvalues(bases)

        made = dict(mean(factors))
        bases = self.bases(forms, made) if self.corrected else {}
        values = mean(eigenvalues) if self.corrected else {}
        constants = tuple(requiring_gradients(list(params.values()), None))
        return self.blocks(params, forms, {**made, **bases, **values}, constants)

    @contextmanager
    def _evaluated(self, params: Mapping[str, Tensor], batch: Any) -> Iterator[Evaluation]:
        space = space_of(params)
        refuse_dtensors(space)
        with (
            linearising(space, params, batch) as (leaves, given),
            noted(self.loss, params, batch),
        ):
            seen = observed(self.model, self.loss, leaves, given)
            columns = None
            if self.columns is not None:
                vectors = self.columns(seen.outputs.detach(), given)
                columns = by_row(vectors, seen.examples) if self.exact else list(vectors)
            yield Evaluation(leaves, seen, columns, self.sharing, self.unsupported)

    def bases(
        self, forms: Mapping[str, Form], factors: Mapping[str, Tensor], /
    ) -> dict[str, Tensor]:
        """Return the eigenvectors of the factors."""
        keys = factor_keys(forms)
        # The unit vectors are the eigenvectors of a diagonal factor.
        return {
            f"basis of {key}": torch.linalg.eigh(factors[key]).eigenvectors
            if factors[key].dim() == 3
            else torch.ones_like(factors[key])
            for key in dict.fromkeys(key for pair in keys.values() for key in pair)
        }

    def blocks(
        self,
        params: Mapping[str, Tensor],
        forms: Mapping[str, Form],
        made: Mapping[str, Tensor],
        constants: tuple[Tensor, ...] = (),
        /,
    ) -> Blocks:
        """Return the blocks, given the means of all statistics."""
        keys = factor_keys(forms)
        blocks: dict[str, Block] = {}
        for name, leaf in params.items():
            form = forms[name]
            if form.kind == "dense":
                blocks[name] = Dense(made[f"matrix of {name}"], form.shape)
            elif form.kind == "diagonal":
                blocks[name] = DiagonalBlock(made[f"diagonal of {name}"], form.shape)
            else:
                left, right = keys[name]
                layout = form.layout
                assert layout is not None
                groups, outputs, inputs = layout.sizes
                inner = form.shape if layout.is_plain else torch.Size((groups, outputs, inputs))
                if self.corrected:
                    sides = made[f"basis of {left}"], made[f"basis of {right}"]
                    block: Block = Eigenbasis(*sides, made[f"eigenvalues of {name}"], inner)
                else:
                    block = Kronecker(
                        made.get(left, leaf.detach().new_ones(groups, outputs)), made[right], inner
                    )
                blocks[name] = block if layout.is_plain else Permuted(block, layout, form.shape)
        return Blocks(blocks, space_of(params), constants)
