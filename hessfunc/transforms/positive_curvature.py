"""The positive-curvature Hessian: the Hessian's diagonal blocks with what is negative replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hessfunc.autograd import differentiable_twice, explained, refuse_autocast
from hessfunc.autograd.contexts import kept_batch
from hessfunc.autograd.custom_functions import Verified
from hessfunc.autograd.overrides import Replaced
from hessfunc.containers import opened
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.reductions import noted, watching
from hessfunc.transforms.chunks import Chunks, ChunkSize, Curvature, Product, block_matvec
from hessfunc.transforms.gauss_newton import (
    checked_outputs,
    hessian_of_outputs,
    linearised,
    refuse_if_outputs_are_cut,
    refuse_without_halves,
)
from hessfunc.transforms.hessian import hvp, kept
from hessfunc.transforms.matvecs.arithmetic import per_block
from hessfunc.trees import Matvec, Tree

Residual: TypeAlias = Literal["abs", "clip", "zero", "none"]

# Nodes of the graph of a function of each entry alone. Piecewise linear ones have no curvature.
_ELEMENTWISE = {
    *("TanhBackward0", "SigmoidBackward0", "GeluBackward0", "SiluBackward0", "MishBackward0"),
    *("SoftplusBackward0", "EluBackward0", "CeluBackward0", "LogSigmoidBackward0"),
    *("HardswishBackward0", "ExpBackward0", "Expm1Backward0"),
    *("LogBackward0", "Log1PBackward0", "ErfBackward0"),
    *("SqrtBackward0", "RsqrtBackward0", "PowBackward0", "ReciprocalBackward0"),
    *("SinBackward0", "CosBackward0", "TanBackward0", "AtanBackward0"),
    *("SinhBackward0", "CoshBackward0", "AsinhBackward0"),
}

# Functions of rows of their input, each row for itself.
_SOFTMAX = {"SoftmaxBackward0", "SafeSoftmaxBackward0", "LogSoftmaxBackward0"}
_NORMALISATION = {
    *("NativeLayerNormBackward0", "NativeGroupNormBackward0", "NativeBatchNormBackward0"),
}
_ROWWISE = _SOFTMAX | _NORMALISATION
# Rows beyond this have matrices that take too long to decompose.
_LONGEST_ROW = 4096


@validated
def pchvp(loss: Loss, /, *, residual: Residual = "abs", chunk_size: ChunkSize = None) -> Curvature:
    """The positive-curvature Hessian, as a curvature function ``(params, batch) -> matvec``.

    Block-diagonal, one block a parameter tensor. The diagonal block of the Hessian is

        J' H J + sum_a J_a' diag(phi''(a) g_a) J_a,

    with J the Jacobian of the outputs and H the criterion's Hessian, and for each activation
    function phi with input a its Jacobian J_a, and g_a the gradient of the loss at its output.
    The second term, the residual, may be negative; it is replaced entry by entry. Softmax and
    normalisations inside the model act on rows (of an example; of a channel, for BatchNorm in
    train mode), and take the eigenvalues of each row's matrix. A product of two functions of one
    parameter (attention, a gate), by entries or of matrices, takes those of [[0, K], [K', 0]].

    Activations are found in the graph of the loss, as modules or as functions, in any
    architecture, skip connections included.

    Args:
        loss: with its two halves, as made by `supervised` or `composed`.
        residual: ``"abs"``: its absolute value; ``"clip"``: its positive part; ``"zero"``: left
            out, which gives the blocks of the Gauss-Newton matrix; ``"none"``: as it is, which
            gives the blocks of the Hessian.
        chunk_size: as in `ggnvp`.

    Raises:
        TypeError: the loss does not show its halves.
        NotImplementedError: (from the curvature function) the model has another nonlinearity: of
            two functions of one parameter (a quotient, say), found in the graph, or of one, found
            by comparing ``"none"`` with the Hessian's blocks once.

    Cost: one product a parameter tensor and vector.

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
        space = space_of(params)
        refuse_autocast(space.device)
        leaves = space.tree_leaves(params)
        with torch.inference_mode(False), explained(space, batch), noted(loss, params, batch):
            batch = kept_batch(batch)
            point = kept(leaves)
            with differentiable_twice(space.device) as seen:
                found = _with_residual(
                    loss, space, point, batch, seen, sound, allow_products=residual == "zero"
                )

        def blocks(kind: Residual) -> Matvec:
            with torch.inference_mode(False):
                product = found.product(kind)
            matvec = block_matvec(product, space, leaves, batch, chunks=chunks, copies=point)
            return per_block(matvec, params)

        if not verified and residual != "zero":
            with watching():
                # The loss has been shown already.
                exact = per_block(exact_blocks(params, batch), params)
            _refuse_unless_equal(space, blocks("none"), exact, found)
            verified.append(True)
        return blocks(residual)

    return curvature


@dataclass(frozen=True)
class _Rows:
    """How a tensor is seen as rows ``(..., d)``, and rows as that tensor."""

    of: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Tap:
    """A function inside the model: the edge of its input, and its curvature there.

    ``curvature`` has the input's shape for a function of each entry; it is ``(..., d, d)``, one
    matrix a row, for a function of rows.
    """

    edge: GradientEdge
    shape: torch.Size
    curvature: Tensor
    rows: _Rows | None

    def product(self, residual: Residual) -> Callable[[Tensor], Tensor]:
        if self.rows is None:
            kept = positive(self.curvature, residual)
            return lambda tangent: kept * tangent
        values, vectors = torch.linalg.eigh(self.curvature)
        matrix = (vectors * positive(values, residual)[..., None, :]) @ vectors.mT
        rows = self.rows
        return lambda tangent: rows.back((matrix @ rows.of(tangent)[..., None])[..., 0])


@dataclass(frozen=True)
class _PairTap:
    """A product ``a b`` inside the model, by entries or of matrices: its inputs' edges and shapes.

    With g the gradient of the loss at the product, its curvature is ``[[0, K], [K', 0]]`` with
    ``K db = g db`` by entries, ``g db'`` for matrices.
    """

    edges: tuple[GradientEdge, GradientEdge]
    shapes: tuple[torch.Size, torch.Size]
    slope: Tensor
    of_matrices: bool

    def product(self, residual: Residual) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        crossed = self._crossed_of_matrices if self.of_matrices else self._crossed
        if residual == "none":
            return crossed
        if residual == "zero":
            return lambda a, b: (torch.zeros_like(a), torch.zeros_like(b))
        absolute = self._absolute_of_matrices() if self.of_matrices else self._absolute
        match residual:
            case "abs":
                return absolute
            case "clip":
                # max(R, 0) = (R + |R|) / 2.
                def clipped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
                    pairs = zip(crossed(a, b), absolute(a, b), strict=True)
                    first, second = ((x + y) / 2 for x, y in pairs)
                    return first, second

                return clipped

    def _crossed(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.shapes
        return (self.slope * b).sum_to_size(first), (self.slope * a).sum_to_size(second)

    def _absolute(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.shapes
        size = self.slope.abs()
        return (size * a).sum_to_size(first), (size * b).sum_to_size(second)

    def _crossed_of_matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.slope @ b.mT, a.mT @ self.slope

    def _absolute_of_matrices(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        # |R| = diag((g g')^1/2, (g' g)^1/2).
        left, size, right = torch.linalg.svd(self.slope, full_matrices=False)
        rows, columns = (
            (left * size[..., None, :]) @ left.mT,
            (right.mT * size[..., None, :]) @ right,
        )
        return lambda a, b: (rows @ a, b @ columns)


def positive(values: Tensor, residual: Residual, /) -> Tensor:
    """Curvatures with what is negative replaced."""
    match residual:
        case "abs":
            return values.abs()
        case "clip":
            return values.clamp_min(0)
        case "zero":
            return torch.zeros_like(values)
        case "none":
            return values


@dataclass(frozen=True)
class _Found:
    """What the graph of one batch gives: the ends of the linearisation, and the taps."""

    inputs: Sequence[Tensor]
    ends: Sequence[Tensor | GradientEdge]
    shapes: Sequence[torch.Size]
    outer: Callable[[list[Tensor]], Sequence[Tensor]]
    taps: Sequence[_Tap]
    pairs: Sequence[_PairTap]
    nodes: frozenset[str]

    def product(self, residual: Residual) -> Product:
        inner = [tap.product(residual) for tap in self.taps]
        paired = [pair.product(residual) for pair in self.pairs]
        first_pair = len(self.ends) - 2 * len(self.pairs)
        first_tap = first_pair - len(self.taps)

        def between(tangents: list[Tensor]) -> Sequence[Tensor]:
            found = list(self.outer(tangents[:first_tap]))
            found += [fn(t) for fn, t in zip(inner, tangents[first_tap:first_pair], strict=True)]
            for i, fn in enumerate(paired):
                found += fn(*tangents[first_pair + 2 * i : first_pair + 2 * i + 2])
            return found

        return linearised(self.inputs, self.ends, self.shapes, between)


def _with_residual(
    loss: Loss,
    space: Space,
    point: Sequence[Tensor],
    batch: Any,
    seen: Replaced,
    sound: Verified,
    *,
    allow_products: bool,
) -> _Found:
    inputs = [leaf.detach().requires_grad_() for leaf in point]
    # A view of each leaf: a tap may then sit on a parameter itself.
    outputs = checked_outputs(loss, space, [leaf.view_as(leaf) for leaf in inputs], batch)
    hooks = tuple(seen.hooks)
    used, outer = hessian_of_outputs(loss, outputs, batch, verified=sound)
    leaves, _ = opened(outputs, "outputs")
    ends = [leaves[i] for i in used]
    refuse_if_outputs_are_cut(loss, space, inputs, ends, used, batch, hooks, sound)
    nodes = _nodes(ends)
    products = [] if allow_products else _products(nodes, inputs, space)
    curved = [n for n in nodes if n.name() in _ELEMENTWISE | _ROWWISE and _input_of(n)]
    value = loss.criterion(outputs, batch)
    slopes = _slopes(value, curved)
    taps = [
        tap
        for node, slope in zip(curved, slopes, strict=True)
        if slope is not None and (tap := _tap(node, slope)) is not None
    ]
    pairs = [
        pair
        for node, slope in zip(products, _slopes(value, products), strict=True)
        if slope is not None and (pair := _pair_tap(node, slope)) is not None
    ]
    return _Found(
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


# Nodes that are linear in all of their inputs together.
_JOINTLY_LINEAR = {
    *("AddBackward0", "SubBackward0", "CatBackward0", "StackBackward0", "WhereBackward0"),
    *("MaximumBackward0", "MinimumBackward0", "MaskedScatterBackward0", "LerpBackward0"),
}


# Products, and the places of their two factors among the node's inputs.
_PRODUCTS = {
    "MulBackward0": (0, 1),
    **dict.fromkeys(("MmBackward0", "BmmBackward0"), (0, 1)),
    "AddmmBackward0": (1, 2),
}


def _products(nodes: Sequence[Node], inputs: Sequence[Tensor], space: Space) -> list[Node]:
    """The products of two functions of one parameter.

    Raises:
        NotImplementedError: a node combines such functions in another way, and not linearly.
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
            found = frozenset() if own is None else frozenset({own})
            reached[node] = found.union(*(reached[f] for f in following))
        return reached[root]

    products = []
    for node in nodes:
        parts = [parameters_of(f) for f, _ in node.next_functions if f is not None]
        if node.name().startswith(("Addmm", "Baddbmm", "Addbmm", "Addmv")):
            # The first is added to the product of the others.
            parts = parts[1:]
        shared = {n for i, a in enumerate(parts) for b in parts[:i] for n in a & b}
        if shared and node.name() in _PRODUCTS:
            products.append(node)
        elif shared and node.name() not in _JOINTLY_LINEAR:
            raise NotImplementedError(
                f"{node.name().removesuffix('Backward0')} combines two functions of the parameter "
                f"{min(shared)!r}, and the residual of that has no entries, rows or products of "
                "its own: take residual='zero', or per_block(hvp(loss)(params, batch), params) "
                "for the Hessian's own blocks"
            )
    return products


def _pair_tap(node: Node, slope: Tensor) -> _PairTap | None:
    following = [node.next_functions[i] for i in _PRODUCTS[node.name()]]
    edges = [GradientEdge(f, place) for f, place in following if f is not None]
    if len(edges) < 2:
        return None
    shapes = [_shape_at(edge) for edge in edges]
    scale = getattr(node, "_saved_alpha", 1)
    return _PairTap(
        (edges[0], edges[1]),
        (shapes[0], shapes[1]),
        scale * slope.detach(),
        node.name() != "MulBackward0",
    )


def _shape_at(edge: Any) -> torch.Size:
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def _slopes(value: Tensor, nodes: Sequence[Node]) -> Sequence[Tensor | None]:
    """The gradient of the loss at the output of each node."""
    if not nodes:
        return []
    return torch.autograd.grad(
        value, [GradientEdge(node, 0) for node in nodes], retain_graph=True, allow_unused=True
    )


def _nodes(ends: Sequence[Tensor]) -> list[Node]:
    """The nodes of the graph of these tensors, in the order in which they are met."""
    waiting = [end.grad_fn for end in ends]
    seen: dict[Node, None] = {}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = None
            waiting.extend(following for following, _ in node.next_functions)
    return list(seen)


def _input_of(node: Node) -> GradientEdge | None:
    following, place = node.next_functions[0]
    return None if following is None else GradientEdge(following, place)


def _tap(node: Node, slope: Tensor) -> _Tap | None:
    edge = cast(GradientEdge, _input_of(node))
    # The node is the map w -> phi'(a) w: its derivative with respect to a is phi''(a) w.
    others = [None] * (_outputs(node) - 1)
    pulled = cast(Callable[..., Any], node)(slope.detach(), *others)
    pulled = pulled[0] if isinstance(pulled, tuple) else pulled
    if pulled is None or not pulled.requires_grad:
        return None
    if node.name() not in _ROWWISE:
        curvature = _derivative(pulled, edge, torch.ones_like(pulled))
        return None if curvature is None else _Tap(edge, pulled.shape, curvature, None)
    rows = _rows_of(node, pulled)
    width = rows.of(pulled).shape[-1]
    if width > _LONGEST_ROW:
        raise NotImplementedError(
            f"{node.name().removesuffix('Backward0')} acts on rows of {width} entries, and the "
            f"eigenvalues of matrices beyond {_LONGEST_ROW} take too long: take residual='zero'"
        )
    columns = []
    for i in range(width):
        one = torch.zeros_like(rows.of(pulled))
        one[..., i] = 1
        column = _derivative(pulled, edge, rows.back(one))
        if column is None:
            return None
        columns.append(rows.of(column))
    return _Tap(edge, pulled.shape, torch.stack(columns, dim=-2), rows)


def _outputs(node: Any) -> int:
    # Normalisations also give their statistics, and the node takes a gradient for each of them.
    return 1 if node.name() == "NativeLayerNormBackward0" else len(node._input_metadata)


def _derivative(pulled: Tensor, edge: GradientEdge, direction: Tensor) -> Tensor | None:
    return torch.autograd.grad(
        pulled, [edge], direction.detach(), retain_graph=True, allow_unused=True
    )[0]


def _rows_of(node: Any, like: Tensor) -> _Rows:
    shape = like.shape
    if node.name() in _SOFTMAX:
        # Saved as unsigned: a negative axis comes back beyond 2^63.
        axis = node._saved_dim - 2**64 if node._saved_dim >= 2**63 else node._saved_dim
        return _Rows(lambda t: torch.movedim(t, axis, -1), lambda r: torch.movedim(r, -1, axis))
    if node.name() == "NativeLayerNormBackward0":
        first = len(shape) - len(node._saved_normalized_shape)
        return _Rows(lambda t: t.flatten(first), lambda r: r.reshape(shape))
    if node.name() == "NativeGroupNormBackward0":
        groups = node._saved_group
        return _Rows(lambda t: t.reshape(shape[0], groups, -1), lambda r: r.reshape(shape))
    # Batch statistics: a row is a channel of all examples.
    channels = (shape[1], shape[0], *shape[2:])
    return _Rows(
        lambda t: t.transpose(0, 1).flatten(1),
        lambda r: r.reshape(channels).transpose(0, 1),
    )


def _refuse_unless_equal(space: Space, found: Matvec, exact: Matvec, what: _Found) -> None:
    probe = space.unravel(space.probes([0], kind="normal", seed=0))
    ours, blocks = space.ravel(found(probe)), space.ravel(exact(probe))
    tolerance = 1e-6 if space.dtype == torch.float64 else 1e-2
    errors = space.by_leaf(ours - blocks, ours - blocks).sqrt()
    sizes = space.by_leaf(blocks, blocks).sqrt()
    if bool((errors > tolerance * (sizes + 1e-3 * sizes.max())).any()):
        unknown = sorted(name.removesuffix("Backward0") for name in what.nodes)
        raise NotImplementedError(
            "the model has a nonlinearity other than the usual elementwise functions, softmax and "
            f"normalisations, among {', '.join(unknown)}. Take residual='zero', or "
            "per_block(hvp(loss)(params, batch), params) for the Hessian's own blocks"
        )
