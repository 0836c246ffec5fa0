"""Curvature functions whose blocks are made from sums over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hessfunc.kronecker.block import Block
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.calls import differentiating, refuse_dtensors
from hessfunc.kronecker.composite_blocks import Joint, Permuted
from hessfunc.kronecker.evaluation import Bias, Evaluation, Unsupported
from hessfunc.kronecker.factored_blocks import Dense, DiagonalBlock, Eigenbasis, Kronecker
from hessfunc.kronecker.forms import Form, both_ways, factor_keys, is_factor
from hessfunc.kronecker.moments import Sharing, by_row
from hessfunc.kronecker.observation import observed
from hessfunc.kronecker.verification import Verification
from hessfunc.losses import Loss
from hessfunc.numerics import NARROW
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.batches.statistics import Stage, Statistics
from hessfunc.transforms.batches.sums import Partition
from hessfunc.transforms.evaluation import requiring_gradients, scalar

# Function (outputs, batch) -> columns (c, B, ...) with sum_c u_bc u_bc' = H_b, the Hessian of the
# criterion at the outputs of example b, exactly or in expectation.
Columns: TypeAlias = Callable[[Tensor, Any], Tensor]
# Function that applies another one to each of several matrices, which ranks may divide.
Each: TypeAlias = Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], list[Tensor]]


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
        steps: Number of power iterations that move the factors to the nearest ones, as in `kfoc`.
        exact: Whether the columns are exact, so that the rows of an example must not be mixed.
        unsupported: Treatment of parameters without Kronecker factors.
        bias: Whether a weight and its bias have blocks apart, or a joint one.
        verification: Verification of the uses of parameters.
    """

    loss: Loss
    model: nn.Module
    columns: Columns | None
    sharing: Sharing
    corrected: bool = False
    steps: int = 0
    exact: bool = True
    unsupported: Unsupported = "error"
    bias: Bias = "apart"
    verification: Verification = field(default_factory=Verification)

    def __call__(self, params: Mapping[str, Tensor], batch: Any, /) -> Blocks:
        with self._evaluated(params, batch) as evaluation:
            made = self._means(lambda stage: stage(evaluation).mean(), Partition().each)
        constants = tuple(requiring_gradients(list(params.values()), batch))
        return self._blocks(params, evaluation.forms, made, constants)

    def over_batches(
        self,
        params: Mapping[str, Tensor],
        mean: Callable[[Stage], Mapping[str, Tensor]],
        each: Each,
        /,
    ) -> Blocks:
        """Return the blocks of a data set, given the functions that average and divide work."""
        forms: dict[str, Form] = {}

        def means(stage: Callable[[Evaluation], Statistics]) -> Mapping[str, Tensor]:
            def of_batch(params: Mapping[str, Tensor], batch: Any) -> Statistics:
                with self._evaluated(params, batch) as evaluation:
                    if forms and forms != evaluation.forms:
                        raise ValueError(
                            "the model uses its parameters in another way in another batch, so "
                            "that their blocks have different structures: use batches of the same "
                            "kind"
                        )
                    forms.update(evaluation.forms)
                    return stage(evaluation)

            return mean(of_batch)

        made = self._means(means, each)
        constants = tuple(requiring_gradients(list(params.values()), None))
        return self._blocks(params, forms, made, constants)

    def _means(
        self,
        mean: Callable[[Callable[[Evaluation], Statistics]], Mapping[str, Tensor]],
        each: Each,
    ) -> dict[str, Tensor]:
        """Return the means of all statistics, given the function that averages those of a stage."""
        made = both_ways(mean(Evaluation.factors))
        stages: list[Callable[[Evaluation, Mapping[str, Tensor]], Statistics]] = []
        for _ in range(self.steps):
            # Power iteration on the rearranged matrix: each half is a least-squares problem.
            stages += [Evaluation.nearest_output_factors, Evaluation.nearest_input_factors]
        if self.corrected:
            made |= _bases(made, each)
            stages.append(Evaluation.eigenvalues)
        for stage in stages:
            made |= mean(_of_evaluation(stage, dict(made)))
        return made

    @contextmanager
    def _evaluated(self, params: Mapping[str, Tensor], batch: Any) -> Iterator[Evaluation]:
        space = space_of(params)
        refuse_dtensors(space)
        _refuse_narrow(params)
        with (
            differentiating(space, params, batch) as (leaves, given),
            noted(self.loss, params, batch),
        ):
            verify = self.verification
            seen = verify(observed(self.model, self.loss, leaves, given, verify.expansions), leaves)
            with torch.no_grad():
                # Output Hessians do not look at all targets, which the criterion checks.
                scalar(self.loss.criterion(seen.outputs, given))
            columns = None
            if self.columns is not None:
                vectors = self.columns(seen.outputs.detach(), given)
                columns = by_row(vectors, seen.examples) if self.exact else list(vectors)
            yield Evaluation(
                leaves,
                seen,
                columns,
                self.sharing,
                self.unsupported,
                shares_outputs=not self.steps,
                joins_biases=self.bias == "joint",
            )

    def _blocks(
        self,
        params: Mapping[str, Tensor],
        forms: Mapping[str, Form],
        made: Mapping[str, Tensor],
        constants: tuple[Tensor, ...] = (),
        /,
    ) -> Blocks:
        """Return the blocks, given the means of all statistics."""
        blocks: dict[str, Block] = {}
        for name in params:
            form = forms[name]
            if form.kind == "dense":
                blocks[name] = Dense(made[f"matrix of {name}"], form.shape)
            elif form.kind == "diagonal":
                blocks[name] = DiagonalBlock(made[f"diagonal of {name}"], form.shape)
            elif form.kind == "kronecker":
                blocks[name] = self._factored(name, forms, made)
        biases = {name: form.bias for name, form in forms.items() if form.bias is not None}
        return Blocks(blocks, space_of(params), constants, biases)

    def _factored(self, name: str, forms: Mapping[str, Form], made: Mapping[str, Tensor]) -> Block:
        form, (left, right) = forms[name], factor_keys(forms)[name]
        layout = form.layout
        assert layout is not None
        groups, outputs, inputs = layout.sizes
        is_plain = layout.is_plain and form.bias is None
        shape = torch.Size((groups, outputs, inputs + (form.bias is not None)))
        inner = form.shape if is_plain else shape
        if self.corrected:
            sides = made[f"basis of {left}"], made[f"basis of {right}"]
            block: Block = Eigenbasis(*sides, made[f"eigenvalues of {name}"], inner)
        else:
            ones = made[right].new_ones(groups, outputs)
            block = Kronecker(made.get(left, ones), made[right], inner)
        if is_plain:
            return block
        if form.bias is not None:
            return Joint(block, layout, torch.Size((shape.numel(),)))
        return Permuted(block, layout, form.shape)


def _refuse_narrow(params: Mapping[str, Tensor]) -> None:
    """Raise TypeError for 16-bit parameters, in which sums over examples lose small terms."""
    for name, leaf in params.items():
        if leaf.dtype in NARROW:
            raise TypeError(
                f"parameter {name!r} is {leaf.dtype}, too narrow for the sums of Kronecker "
                "factors: call `model.float()`, and use `functional(model, dtype=torch.bfloat16)` "
                "to evaluate the model in low precision"
            )


def _of_evaluation(
    stage: Callable[[Evaluation, Mapping[str, Tensor]], Statistics], made: Mapping[str, Tensor]
) -> Callable[[Evaluation], Statistics]:
    return lambda evaluation: stage(evaluation, made)


def _bases(factors: Mapping[str, Tensor], each: Each) -> dict[str, Tensor]:
    """Return the eigenvectors of the factors. Those of a diagonal factor are the unit vectors."""
    places: dict[str, int] = {}
    distinct: list[Tensor] = []
    for key, factor in factors.items():
        if is_factor(key) and factor.dim() == 3:
            # Parameters with the same inputs share a factor, which is decomposed once.
            equal = (i for i, other in enumerate(distinct) if torch.equal(factor, other))
            places[key] = next(equal, len(distinct))
            distinct += [factor] * (places[key] == len(distinct))
    vectors = each(lambda matrix: torch.linalg.eigh(matrix).eigenvectors, distinct)
    return {
        f"basis of {key}": vectors[places[key]] if key in places else torch.ones_like(factor)
        for key, factor in factors.items()
        if is_factor(key)
    }
