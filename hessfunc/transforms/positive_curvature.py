"""Positive-curvature Hessian: diagonal blocks of the Hessian with negative curvature replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.constant_matrix import Product
from hessfunc.autograd.custom_functions import Verified
from hessfunc.autograd.functorch import nodes_of, transforming
from hessfunc.autograd.overrides import Replaced
from hessfunc.containers import opened
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.reductions import watching
from hessfunc.transforms.chunks import Chunks, ChunkSize, Curvature
from hessfunc.transforms.evaluation import linearising
from hessfunc.transforms.gauss_newton import hessian_of_outputs
from hessfunc.transforms.hessian import hvp
from hessfunc.transforms.matvecs.arithmetic import per_block
from hessfunc.transforms.output_matrices import (
    checked_outputs,
    linearised,
    refuse_if_outputs_are_cut,
    refuse_without_halves,
)
from hessfunc.transforms.taps import (
    ELEMENTWISE,
    PRODUCTS,
    ROWWISE,
    PairTap,
    Residual,
    Tap,
    input_of,
    pair_tap_of,
    tap_of,
)
from hessfunc.trees import Matvec, Tree


@validated
def pchvp(loss: Loss, /, *, residual: Residual = "abs", chunk_size: ChunkSize = None) -> Curvature:
    """Return the positive-curvature Hessian as a function ``(params, batch) -> matvec``.

    The matrix is block-diagonal with one block per parameter tensor. The corresponding block of
    the Hessian is

        J' H J + sum_a J_a' diag(phi''(a) g_a) J_a.

    J is the Jacobian of the outputs, and H is the Hessian of the criterion. The sum runs over the
    activation functions phi. J_a is the Jacobian of the input a of phi, and g_a is the gradient of
    the loss with respect to the output of phi. This second term, the residual, may be negative;
    its diagonal entries phi''(a) g_a are replaced according to ``residual``.

    Two other kinds of functions inside the model have matrices instead of diagonal entries, whose
    eigenvalues are replaced. Softmax and normalisations act on rows (of an example or, for
    BatchNorm in train mode, of a channel), with one matrix per row. A product of two functions of
    one parameter (attention, a gate), elementwise or of matrices, has the matrix
    [[0, K], [K', 0]].

    Activations are read from the graph of the loss. They may be modules or functions, in any
    architecture, including skip connections.

    Args:
        loss: Loss with outputs and criterion, as returned by `supervised` or `composed`.
        residual: Replacement of the residual: ``"abs"`` for its absolute value, ``"clip"`` for its
            positive part, ``"zero"`` to omit it, which gives the blocks of the Gauss-Newton
            matrix, or ``"none"`` to keep it, which gives the blocks of the Hessian.
        chunk_size: Number of vectors in one pass, as in `ggnvp`.

    Raises:
        TypeError: If ``loss`` is a plain function without outputs and criterion.
        NotImplementedError: If the model has another nonlinearity; raised by the curvature
            function. A nonlinearity of two functions of the same parameter, such as a quotient, is
            recognised in the graph. Others are recognised by a comparison of ``"none"`` with the
            blocks of the Hessian, which is made once.

    Cost: one product per parameter tensor and vector.

    Source: Dangel, Harmeling and Hennig 2019, arXiv 1902.01813; Chen, Chou and Chang 2018,
    arXiv 1802.06502.
    """
    refuse_without_halves(loss)
    if residual not in ("abs", "clip", "zero", "none"):
        raise ValueError(f"residual={residual!r}: choose 'abs', 'clip', 'zero' or 'none'")
    chunks = Chunks(chunk_size)
    exact_blocks = hvp(loss, chunk_size=chunk_size)
    verified: list[bool] = []
    sound: Verified = set()

    def curvature(params: Tree, batch: Any) -> Matvec:
        if transforming():
            raise NotImplementedError(
                "`pchvp` reads the activations from a graph of autograd, which transforms of "
                "torch.func and torch.compile do not give: call pchvp(loss)(params, batch) outside "
                "of them. Its products can be transformed as functions of the vectors"
            )
        space = space_of(params)
        with (
            linearising(loss, space, params, batch) as at,
            differentiable_twice(space.device) as seen,
        ):
            graph = _with_residual(
                loss, space, at.inputs(), at.batch, seen, sound, allow_products=residual == "zero"
            )

        def blocks(kind: Residual) -> Matvec:
            with torch.inference_mode(False):
                product = graph.product(kind)
            return per_block(at.matvec(product, chunks=chunks), params)

        if not verified and residual != "zero":
            with watching():
                # The loss has been noted already, and must not count twice.
                exact = per_block(exact_blocks(params, batch), params)
            _refuse_unless_equal(space, blocks("none"), exact, graph)
            verified.append(True)
        return blocks(residual)

    return curvature


@dataclass(frozen=True)
class _Linearisation:
    """Linearisation of the loss of one batch, and its nonlinear functions.

    Attributes:
        inputs: Leaves of the parameters.
        ends: Outputs of the model, then the inputs of ``taps`` and the factors of ``pairs``.
        shapes: Shape of each end.
        outer: Product with the Hessian of the criterion.
        taps: Nonlinear functions of one input.
        pairs: Products of two functions of one parameter.
        nodes: Names of all nodes of the graph.
    """

    inputs: Sequence[Tensor]
    ends: Sequence[Tensor | GradientEdge]
    shapes: Sequence[torch.Size]
    outer: Callable[[list[Tensor]], Sequence[Tensor]]
    taps: Sequence[Tap]
    pairs: Sequence[PairTap]
    nodes: frozenset[str]

    def product(self, residual: Residual) -> Product:
        inner = [tap.product(residual) for tap in self.taps]
        paired = [pair.product(residual) for pair in self.pairs]
        first_pair = len(self.ends) - 2 * len(self.pairs)
        first_tap = first_pair - len(self.taps)

        def between(tangents: list[Tensor]) -> Sequence[Tensor]:
            # Block-diagonal B: H on the outputs, and the curvature of each tap and pair.
            products = list(self.outer(tangents[:first_tap]))
            products += [fn(t) for fn, t in zip(inner, tangents[first_tap:first_pair], strict=True)]
            for i, fn in enumerate(paired):
                products += fn(*tangents[first_pair + 2 * i : first_pair + 2 * i + 2])
            return products

        return linearised(self.inputs, self.ends, self.shapes, between)


def _with_residual(
    loss: Loss,
    space: Space,
    inputs: Sequence[Tensor],
    batch: Any,
    seen: Replaced,
    sound: Verified,
    *,
    allow_products: bool,
) -> _Linearisation:
    # Pass views of the leaves, because a tap needs a graph node even on a parameter itself.
    outputs = checked_outputs(loss, space, [leaf.view_as(leaf) for leaf in inputs], batch)
    hooks = tuple(seen.hooks)
    used, outer = hessian_of_outputs(loss, outputs, batch, verified=sound)
    leaves, _ = opened(outputs, "outputs")
    ends = [leaves[i] for i in used]
    refuse_if_outputs_are_cut(loss, space, inputs, ends, used, batch, hooks, sound)
    nodes = nodes_of(ends)
    products = [] if allow_products else _products(nodes, inputs, space)
    curved = [n for n in nodes if n.name() in ELEMENTWISE | ROWWISE and input_of(n)]
    value = loss.criterion(outputs, batch)
    slopes = _slopes(value, curved)
    taps = [
        tap
        for node, slope in zip(curved, slopes, strict=True)
        if slope is not None and (tap := tap_of(node, slope)) is not None
    ]
    pairs = [
        pair
        for node, slope in zip(products, _slopes(value, products), strict=True)
        if slope is not None and (pair := pair_tap_of(node, slope)) is not None
    ]
    return _Linearisation(
        inputs,
        [*ends, *(tap.edge for tap in taps), *(edge for pair in pairs for edge in pair.edges)],
        [end.shape for end in ends]
        + [tap.shape for tap in taps]
        + [shape for pair in pairs for shape in pair.shapes],
        outer,
        taps,
        pairs,
        frozenset(node.name() for node in nodes),
    )


# Nodes that are linear in all of their inputs jointly.
_JOINTLY_LINEAR = {
    *("AddBackward0", "SubBackward0", "CatBackward0", "StackBackward0", "WhereBackward0"),
    *("MaximumBackward0", "MinimumBackward0", "MaskedScatterBackward0", "LerpBackward0"),
}


def _products(nodes: Sequence[Node], inputs: Sequence[Tensor], space: Space) -> list[Node]:
    """Return the nodes that multiply two functions of one parameter.

    Raises:
        NotImplementedError: If a node combines such functions in another nonlinear way.
    """
    names = {id(leaf): name for leaf, name in zip(inputs, space.names, strict=True)}
    reached: dict[Node, frozenset[str]] = {}

    def parameters_of(root: Node) -> frozenset[str]:
        waiting = [root]
        while waiting:
            node = waiting[-1]
            following = [f for f, _ in node.next_functions if f is not None]
            if unknown := [f for f in following if f not in reached]:
                waiting.extend(unknown)
                continue
            waiting.pop()
            own = names.get(id(getattr(node, "variable", None)))
            direct = frozenset() if own is None else frozenset({own})
            reached[node] = direct.union(*(reached[f] for f in following))
        return reached[root]

    products = []
    for node in nodes:
        parts = [parameters_of(f) for f, _ in node.next_functions if f is not None]
        if node.name().startswith(("Addmm", "Baddbmm", "Addbmm", "Addmv")):
            # The node adds its first input to the product of the others.
            parts = parts[1:]
        shared = {n for i, a in enumerate(parts) for b in parts[:i] for n in a & b}
        if shared and node.name() in PRODUCTS:
            products.append(node)
        elif shared and node.name() not in _JOINTLY_LINEAR:
            raise NotImplementedError(
                f"{node.name().removesuffix('Backward0')} combines two functions of the parameter "
                f"{min(shared)!r}, and its residual is neither elementwise nor by rows nor that of "
                "a product: use residual='zero', or per_block(hvp(loss)(params, batch), params) "
                "for the blocks of the Hessian itself"
            )
    return products


def _slopes(value: Tensor, nodes: Sequence[Node]) -> Sequence[Tensor | None]:
    """Return the gradient of the loss with respect to the output of each node."""
    if not nodes:
        return []
    return torch.autograd.grad(
        value, [GradientEdge(node, 0) for node in nodes], retain_graph=True, allow_unused=True
    )


def _refuse_unless_equal(space: Space, matvec: Matvec, exact: Matvec, what: _Linearisation) -> None:
    probe = space.unravel(space.probes([0], kind="normal", seed=0))
    ours, blocks = space.ravel(matvec(probe)), space.ravel(exact(probe))
    tolerance = 1e-6 if space.dtype == torch.float64 else 1e-2
    errors = space.by_leaf(ours - blocks, ours - blocks).sqrt()
    sizes = space.by_leaf(blocks, blocks).sqrt()
    if bool((errors > tolerance * (sizes + 1e-3 * sizes.max())).any()):
        unknown = sorted(name.removesuffix("Backward0") for name in what.nodes)
        raise NotImplementedError(
            "the model has a nonlinearity other than the usual elementwise functions, softmax and "
            f"normalisations, among {', '.join(unknown)}: use residual='zero', or "
            "per_block(hvp(loss)(params, batch), params) for the blocks of the Hessian itself"
        )
