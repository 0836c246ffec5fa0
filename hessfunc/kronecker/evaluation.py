"""Evaluation of a model on one batch, and the second moments of its inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc.kronecker.factored_blocks import adjoint
from hessfunc.kronecker.forms import LEFT, RIGHT, WAYS, Form, factor_keys
from hessfunc.kronecker.linear_maps import Inputs
from hessfunc.kronecker.moments import (
    Sharing,
    example_gradients,
    left_moments,
    outer_moments,
    right_moments,
    squared_moments,
    summed_input_moments,
)
from hessfunc.kronecker.observation import Observed
from hessfunc.kronecker.uses import Uses
from hessfunc.kronecker.verification import UNORDERED
from hessfunc.transforms.batches.statistics import Statistics

Unsupported: TypeAlias = Literal["error", "diagonal"]
Bias: TypeAlias = Literal["apart", "joint"]

# Uses of a parameter, and a function of the gradients at the outputs of all calls, by their ids.
_Task: TypeAlias = tuple[Uses, Callable[[Mapping[int, Tensor]], Tensor]]

# Largest number of entries of a parameter that acts entry by entry with a dense block.
_DENSE = 1024


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of the model on one batch, and the sums over its examples.

    Attributes:
        leaves: Parameters, which require a gradient.
        observed: Outputs of the model, and the uses of its parameters.
        columns: Cotangents of the outputs whose outer products sum to the output Hessian. None
            replaces the output factors by identity matrices.
        sharing: Treatment of positions that share a weight.
        unsupported: Treatment of parameters without Kronecker factors.
        shares_outputs: Whether parameters with the same outputs share their output factor.
        joins_biases: Whether a weight and its bias have one block.
    """

    leaves: Mapping[str, Tensor]
    observed: Observed
    columns: Sequence[Tensor] | None
    sharing: Sharing
    unsupported: Unsupported
    shares_outputs: bool = True
    joins_biases: bool = False

    @cached_property
    def forms(self) -> dict[str, Form]:
        """Structure of each block.

        Raises:
            NotImplementedError: If a parameter has no factors, and no diagonal is asked for.
        """
        forms: dict[str, Form] = {}
        sites: dict[tuple[int, ...], str] = {}
        for name, leaf in self.leaves.items():
            uses = self.observed.uses.get(name)
            layout = None if uses is None else uses.layout
            if uses is None or layout is None:
                self._refuse(name, self.observed.others[name])
                forms[name] = Form("diagonal", leaf.shape)
            elif layout.is_entrywise and self.columns is not None:
                kind: Literal["dense", "diagonal"] = (
                    "dense" if leaf.numel() <= _DENSE else "diagonal"
                )
                forms[name] = Form(kind, leaf.shape, layout)
            else:
                # The weight and the bias of a layer share the factor B, computed once for a site.
                ends = (*map(id, uses.outputs), layout.sizes[0])
                site = sites.setdefault(ends, name) if self.shares_outputs else name
                forms[name] = Form("kronecker", leaf.shape, layout, site)
        return self._joined(forms) if self.joins_biases else forms

    def _joined(self, forms: dict[str, Form]) -> dict[str, Form]:
        """Join each bias with the weight whose calls have the same outputs, without groups."""
        ends = {
            name: tuple(map(id, self.observed.uses[name].outputs))
            for name, form in forms.items()
            if form.kind == "kronecker"
        }
        weights = {
            ends[name]: name
            for name in reversed(ends)
            if len(forms[name].shape) > 1
            and (layout := forms[name].layout) is not None
            and layout.sizes[0] == 1
        }
        for name in ends:
            weight = weights.get(ends[name])
            if len(forms[name].shape) == 1 and weight is not None:
                forms[weight] = replace(forms[weight], bias=name)
                forms[name] = replace(forms[name], kind="joint bias")
        return forms

    def _with_ones(self, name: str, inputs: Inputs) -> Inputs:
        """Return the inputs of a parameter, with a last input of 1 for a joint bias."""
        if self.forms[name].bias is None or not isinstance(inputs, Tensor):
            return inputs
        return torch.cat([inputs, torch.ones_like(inputs[:, :, :1])], 2)

    def _refuse(self, name: str, reason: str) -> None:
        if self.unsupported == "diagonal" and self.columns is not None:
            return
        if UNORDERED in reason:
            raise ValueError(
                f"parameter {name!r} has no Kronecker factors, because {reason}: keep the examples "
                "first, for example with outputs `(examples, classes, positions)` from "
                "`model_fn(params, x).movedim(-1, 1)`"
            )
        raise NotImplementedError(
            f"parameter {name!r} has no Kronecker factors, because {reason}: pass "
            "unsupported='diagonal' for its diagonal (not with fisher='forward-only'), or hold it "
            "fixed with `split` and `hold`"
        )

    def _with(self, kind: str) -> dict[str, Uses]:
        return {
            name: self.observed.uses[name]
            for name, form in self.forms.items()
            if form.kind == kind and name in self.observed.uses
        }

    def factors(self) -> Statistics:
        """Return the factors, and the matrices and diagonals of parameters without them."""
        forms, every = self.forms, self._with("kronecker")
        tasks: dict[str, _Task] = {}
        summed: dict[str, tuple[Tensor, float]] = {}
        # Layers that see the same inputs, such as those of queries, keys and values, share A.
        known: dict[Any, tuple[Tensor, float]] = {}
        for name, uses in every.items():
            ends = LEFT + forms[name].site, RIGHT + name
            if not uses.is_two_way:
                self._add_factors(name, uses, ends, tasks, summed, known)
                continue
            for one, way in zip(uses.ways(), WAYS, strict=True):
                keys = ends[0] + way, ends[1] + way
                self._add_factors(name, one, keys, tasks, summed, known)
        for name in self._with("dense"):
            tasks[f"matrix of {name}"] = self._task(name, _gram_of_examples)
        entrywise = self._with("diagonal")
        tasks |= {f"diagonal of {name}": self._task(name, squared_moments) for name in entrywise}
        weighted = self._summed(tasks)
        for name, uses in entrywise.items():
            key, layout = f"diagonal of {name}", uses.layout
            assert layout is not None
            weighted[key] = layout.restored(weighted[key], self.leaves[name].shape)
        if others := {
            name: self.leaves[name]
            for name, form in forms.items()
            if form.kind == "diagonal" and name not in self.observed.uses
        }:
            squares = self._squared_by_row(others)
            weighted |= {f"diagonal of {name}": square for name, square in squares.items()}
        return Statistics(weighted, summed)

    def _add_factors(
        self,
        name: str,
        uses: Uses,
        keys: tuple[str, str],
        tasks: dict[str, _Task],
        summed: dict[str, tuple[Tensor, float]],
        known: dict[Any, tuple[Tensor, float]],
    ) -> None:
        """Add the task of the factor B of uses, and the sums of their factor A."""
        left, right = keys
        if (source := (uses.source, self.forms[name].bias is None)) not in known:
            with torch.no_grad():
                inputs = self._with_ones(name, uses.inputs())
                total, count = summed_input_moments(inputs, self.sharing)
                known[source] = total.to(self.leaves[name]), count
        summed[right] = total, _ = known[source]
        # Lookups, whose A is a diagonal (G, K), are always expanded.
        sharing = self.sharing if total.dim() == 3 else "expand"
        tasks.setdefault(left, (uses, lambda slopes: outer_moments(uses.slopes(slopes), sharing)))

    def _task(self, name: str, moments: Callable[[Tensor, Inputs], Tensor]) -> _Task:
        """Return the task of a function of the gradients at the outputs and of the inputs."""
        uses = self.observed.uses[name]
        if uses.is_two_way:
            return uses, lambda slopes: moments(*uses.moments(slopes))
        inputs = self._with_ones(name, uses.inputs())
        return uses, lambda slopes: moments(uses.slopes(slopes), inputs)

    def nearest_output_factors(self, factors: Mapping[str, Tensor], /) -> Statistics:
        """Return the factors B with the smallest distance ``|F - B (x) A|_F`` for given A.

        F is ``sum_b vec(V_b) vec(V_b)'`` for the gradients V_b of the examples. The least-squares
        solution is ``B = sum_b V_b A V_b' / |A|_F^2``.
        """
        return Statistics(self._nearest(left_moments, LEFT, RIGHT, factors))

    def nearest_input_factors(self, factors: Mapping[str, Tensor], /) -> Statistics:
        """Return the nearest factors A for given B, ``A = sum_b V_b' B V_b / |B|_F^2``.

        The factor of a lookup is the nearest diagonal matrix.
        """
        return Statistics(self._nearest(right_moments, RIGHT, LEFT, factors))

    def _nearest(
        self,
        moments: Callable[[Tensor, Inputs, Tensor], Tensor],
        side: str,
        other: str,
        factors: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        given = {name: factors[other + name] for name in self._with("kronecker")}
        total = self._summed(
            {
                side + name: self._task(name, partial(_with_factor, moments, factor))
                for name, factor in given.items()
            }
        )
        pairs = zip(total.items(), given.values(), strict=True)
        return {key: _normalised(sums, factor) for (key, sums), factor in pairs}

    def eigenvalues(self, bases: Mapping[str, Tensor], /) -> Statistics:
        """Return the second moments of the gradients along the eigenvectors.

        With eigenvectors U_B and U_A, ``(U_B (x) U_A)' vec(g x') = vec((U_B' g) (U_A' x)')``, so
        that ``s[o, k] = sum_b (sum_p (U_B' g_bp)_o (U_A' x_bp)_k)^2`` (George et al. 2018).
        """
        keys = factor_keys(self.forms)
        tasks: dict[str, _Task] = {}
        for name, uses in self._with("kronecker").items():
            left, right = (adjoint(bases[f"basis of {key}"]) for key in keys[name])
            tasks[f"eigenvalues of {name}"] = self._eigenvalues_of(name, uses, left, right)
        return Statistics(self._summed(tasks))

    def _eigenvalues_of(self, name: str, uses: Uses, left: Tensor, right: Tensor) -> _Task:
        """Return the task of ``sum_b (L V_b R')^2`` for the gradients V_b of a weight."""
        if uses.is_two_way:
            return self._task(
                name, lambda g, x: squared_moments(_turned(left, g), _turned(right, x))
            )
        inputs = self._with_ones(name, uses.inputs())
        if isinstance(inputs, Tensor) and right.dim() == 3:
            outputs, width = left.shape[-1], right.shape[-1]
            of_vectors = inputs.shape[3] * (outputs**2 + width**2)
            if outputs * width * (outputs + width) < of_vectors:
                # Fewer operations than the products of all vectors with L and R.
                return self._task(name, partial(_squared_congruences, left, right))
        turned = _turned(right, inputs)
        return uses, lambda slopes: squared_moments(_turned(left, uses.slopes(slopes)), turned)

    def _gradients(self, uses: Iterable[Uses]) -> Iterator[Mapping[int, Tensor]]:
        """Yield the gradients at the outputs of calls, by their ids, for each column."""
        every = list(uses)
        if every and self.columns is not None and len(self.columns) == 1:
            yield self._gradients_of_one_column
            return
        for column in (self.columns or ()) if every else ():
            yield self.observed.gradients(every, column)

    @cached_property
    def _gradients_of_one_column(self) -> Mapping[int, Tensor]:
        """Gradients at the outputs of all calls, which several stages use."""
        assert self.columns is not None
        return self.observed.gradients(self.observed.uses.values(), self.columns[0])

    def _summed(self, tasks: Mapping[str, _Task]) -> dict[str, Tensor]:
        """Sum functions of the gradients at the outputs of uses over the columns."""
        total: dict[str, Tensor] = {}
        for slopes in self._gradients(uses for uses, _ in tasks.values()):
            for key, (_, fn) in tasks.items():
                part = fn(slopes)
                total[key] = total[key] + part if key in total else part
        return total

    def _squared_by_row(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of the squared gradients of all rows, by one backward pass for each."""
        outputs = self.observed.outputs
        total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for column in self.columns or ():
            for b in range(self.observed.examples):
                own = torch.zeros_like(column).unflatten(0, (self.observed.examples, -1))
                own[b] = column.unflatten(0, own.shape[:2])[b]
                gradients = torch.autograd.grad(
                    outputs,
                    list(leaves.values()),
                    own.flatten(0, 1),
                    retain_graph=True,
                    materialize_grads=True,
                )
                for name, gradient in zip(leaves, gradients, strict=True):
                    total[name] += gradient.square()
        return {name: square.detach() for name, square in total.items()}


def _normalised(moments: Tensor, factor: Tensor) -> Tensor:
    """Divide moments by the squared Frobenius norm of the other factor, which may vanish."""
    squares = factor.square().flatten(1).sum(1)
    scale = torch.where(squares > 0, 1 / squares, 0.0)
    return moments * scale.view(-1, *[1] * (moments.dim() - 1))


def _with_factor(
    moments: Callable[[Tensor, Inputs, Tensor], Tensor],
    factor: Tensor,
    slopes: Tensor,
    inputs: Inputs,
) -> Tensor:
    return moments(slopes, inputs, factor)


def _squared_congruences(left: Tensor, right: Tensor, slopes: Tensor, inputs: Inputs) -> Tensor:
    """Return ``sum_b (L V_b R')^2`` from the gradients V_b of all examples."""
    parts = (_turned(left, each) @ right.mT for _, each in example_gradients(slopes, inputs))
    return torch.stack([part.square().sum(0) for part in parts]).sum(0)


def _turned(basis: Tensor, vectors: Any) -> Any:
    """Return ``U' v`` for vectors ``(B, G, N, P)``; a basis ``(G, N)`` is the unit vectors."""
    return vectors if basis.dim() == 2 else basis @ vectors


def _gram_of_examples(slopes: Tensor, inputs: Inputs) -> Tensor:
    """Return ``sum_b g_b g_b'`` for the gradients of a parameter that acts entry by entry."""
    total = slopes.new_zeros(slopes.shape[1], slopes.shape[1])
    for _, gradients in example_gradients(slopes, inputs):
        rows = gradients.flatten(1)
        total += rows.mT @ rows
    return total
