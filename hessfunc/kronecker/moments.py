"""Second moments of inputs and gradients, summed over examples and positions.

Inputs X are ``(B, G, K, P)``, or ``(1, G, K, P)`` if all examples share them, and gradients at the
outputs are ``(B, G, O, P)``, for B examples, G groups and P positions. The gradient of a weight is
``sum_bp g_bp x_bp'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from hessfunc.kronecker.linear_maps import Inputs, OneHot
from hessfunc.memory import AT_ONCE, refuse_unless_fits

# Number of rows of a symmetric matrix that are computed at once.
_ROWS = 96

Sharing: TypeAlias = Literal["expand", "reduce"]


def refuse_sharing(sharing: str, /) -> None:
    """Raise ValueError for another treatment of positions than "expand" and "reduce"."""
    if sharing not in get_args(Sharing):
        raise ValueError(f"sharing={sharing!r}: choose 'expand' or 'reduce'")


def by_row(columns: Tensor, examples: int) -> list[Tensor]:
    """Split each column into one per row of an example, zero at the other rows.

    Without this, the square of a sum over rows would have cross terms between them.
    """
    rows = columns.shape[1] // examples
    if rows == 1:
        return list(columns)
    parts = []
    for column in columns:
        for row in range(rows):
            one = torch.zeros_like(column).unflatten(0, (examples, rows))
            one[:, row] = column.unflatten(0, (examples, rows))[:, row]
            parts.append(one.flatten(0, 1))
    return parts


def outer_moments(slopes: Tensor, sharing: Sharing) -> Tensor:
    """Return the factor B of one column, ``(G, O, O)``."""
    # "expand": sum_bp g_bp g_bp'. "reduce": sum_b (sum_p g_bp) (sum_p g_bp)'.
    return _gram(slopes if sharing == "expand" else slopes.sum(-1, keepdim=True))


def summed_input_moments(inputs: Inputs, sharing: Sharing) -> tuple[Tensor, int]:
    """Return the factor A times the number of its terms, and this number.

    The factor is ``(G, K, K)``, or its diagonal ``(G, K)`` for a lookup.
    """
    if isinstance(inputs, OneHot):
        # e_i e_i' is diagonal, so that the sum counts the indices. The index K has no input.
        counts = inputs.indices.flatten().bincount(minlength=inputs.size + 1)
        return counts[None, : inputs.size].to(torch.get_default_dtype()), inputs.indices.numel()
    # "expand": sum_bp x_bp x_bp'. "reduce": sum_b xbar_b xbar_b'.
    if sharing == "reduce":
        inputs = inputs.mean(-1, keepdim=True)
    return _gram(inputs), len(inputs) * inputs.shape[-1]


def _gram(vectors: Tensor) -> Tensor:
    """Sum outer products over examples and positions: ``(B, G, N, P)`` -> ``(G, N, N)``."""
    groups, width = vectors.shape[1:3]
    if groups * width**2 > vectors.numel():
        refuse_unless_fits(
            groups * width**2,
            vectors,
            f"a Kronecker factor of {width} x {width} entries",
            "hold that layer fixed with `split` and `hold`, or use exact products",
        )
    columns = vectors.permute(1, 2, 0, 3).flatten(2)
    if width < 2 * _ROWS:
        return columns @ columns.mT
    # Compute the upper triangle of blocks only: the matrix is symmetric.
    total = columns.new_empty(groups, width, width)
    for start in range(0, width, _ROWS):
        end = min(start + _ROWS, width)
        total[:, start:end, start:] = columns[:, start:end] @ columns[:, start:].mT
        total[:, end:, start:end] = total[:, start:end, end:].mT
    return total


def weight_gradient(slopes: Tensor, inputs: Inputs) -> Tensor:
    """Return the gradient of a weight, ``sum_bp g_bp x_bp'``, as ``(G, O, K)``."""
    if isinstance(inputs, OneHot):
        rows = slopes[:, 0].movedim(1, -1).flatten(0, 1)
        total = rows.new_zeros(inputs.size + 1, rows.shape[1])
        return total.index_add_(0, inputs.indices.flatten(), rows)[None, :-1].mT
    return torch.einsum("bgop,bgkp->gok", slopes, inputs.to(slopes).expand(len(slopes), -1, -1, -1))


def example_gradients(slopes: Tensor, inputs: Inputs) -> Iterator[tuple[slice, Tensor]]:
    """Yield the gradients of a weight for a few examples at a time, ``(b, G, O, K)``.

    Each comes with the slice of the examples.
    """
    fan_in = inputs.size if isinstance(inputs, OneHot) else inputs.shape[2]
    most = max(1, AT_ONCE // (slopes[0, ..., 0].numel() * fan_in))
    for start in range(0, len(slopes), most):
        part = slice(start, min(start + most, len(slopes)))
        if isinstance(inputs, OneHot):
            alone = range(part.start, part.stop)
            yield (
                part,
                torch.stack(
                    [
                        weight_gradient(
                            slopes[b : b + 1], OneHot(inputs.indices[b : b + 1], fan_in)
                        )
                        for b in alone
                    ]
                ),
            )
        else:
            own = inputs[part] if len(inputs) == len(slopes) else inputs
            if slopes.shape[2] == fan_in == 1:
                # A product of matrices would copy vectors whose entries are not next to each other.
                yield part, (slopes[part] * own).sum(-1, keepdim=True).to(slopes)
            else:
                yield part, slopes[part] @ own.to(slopes).mT


def squared_moments(slopes: Tensor, inputs: Inputs) -> Tensor:
    """Sum the squared entries of the gradients of all examples: ``(G, O, K)``."""
    if isinstance(inputs, OneHot):
        # Sum the gradients of each pair of example and index, and then the squares of the sums.
        count, size = len(slopes), inputs.size + 1
        keys = torch.arange(count, device=slopes.device)[:, None] * size + inputs.indices
        pairs, places = keys.flatten().unique(return_inverse=True)
        rows = slopes[:, 0].movedim(1, -1).flatten(0, 1)
        sums = rows.new_zeros(len(pairs), rows.shape[1]).index_add_(0, places, rows)
        total = rows.new_zeros(size, rows.shape[1]).index_add_(0, pairs % size, sums.square())
        return total[None, :-1].mT
    # The gradient of an example is sum_p g_p x_p'. With one position, (g_o x_k)^2 = g_o^2 x_k^2.
    if slopes.shape[-1] == 1:
        left, right = slopes[..., 0].square(), inputs[..., 0].square()
        return torch.einsum("bgo,bgk->gok", left, right.expand(len(slopes), -1, -1))
    parts = [gradients.square().sum(0) for _, gradients in example_gradients(slopes, inputs)]
    return torch.stack(parts).sum(0)


def left_moments(slopes: Tensor, inputs: Inputs, right: Tensor) -> Tensor:
    """Return ``sum_b V_b A V_b'`` for the gradients V_b of a weight, ``(G, O, O)``.

    Args:
        slopes: Gradients at the outputs.
        inputs: Inputs.
        right: Matrices A, ``(G, K, K)``, or their diagonals ``(G, K)``.
    """
    total = slopes.new_zeros(slopes.shape[1], slopes.shape[2], slopes.shape[2])
    for _, gradients in example_gradients(slopes, inputs):
        other = gradients * right[:, None] if right.dim() == 2 else gradients @ right
        total += _flat(other) @ _flat(gradients).mT
    return total


def right_moments(slopes: Tensor, inputs: Inputs, left: Tensor) -> Tensor:
    """Return ``sum_b V_b' B V_b`` for the gradients V_b of a weight, ``(G, K, K)``.

    For a lookup, it is the diagonal of that matrix, ``(G, K)``.

    Args:
        slopes: Gradients at the outputs.
        inputs: Inputs.
        left: Matrices B, ``(G, O, O)``.
    """
    parts = []
    for _, gradients in example_gradients(slopes, inputs):
        other = left @ gradients
        if isinstance(inputs, OneHot):
            parts.append((gradients * other).sum((0, 2)))
        else:
            parts.append(_flat(gradients.mT) @ _flat(other.mT).mT)
    return torch.stack(parts).sum(0)


def _flat(gradients: Tensor) -> Tensor:
    """Join the examples and the last axis: ``(b, G, N, M)`` -> ``(G, N, b M)``."""
    return gradients.permute(1, 2, 0, 3).flatten(2)


def nearest_product(lefts: Sequence[Tensor], rights: Sequence[Tensor], /) -> tuple[Tensor, Tensor]:
    """Return B and A that minimise ``|sum_i L_i (x) R_i - B (x) A|_F``, ``(1, n, n)`` each.

    They are the leading singular vectors of the rearranged matrix ``sum_i vec(L_i) vec(R_i)'``:
    B = sum_i b_i L_i for the leading eigenvector b of ``<R_i, R_j> <L_j, L_k>``, and
    A = sum_i a_i R_i with a = <L_i, B> / |B|^2 (Van Loan and Pitsianis 1993). For positive
    semi-definite matrices, all inner products and the coefficients are not negative.
    """
    many = [
        torch.stack([torch.diag_embed(f) if f.dim() == 2 else f for f in factors])
        for factors in (lefts, rights)
    ]
    left, right = (torch.einsum("igkl,jgkl->ij", f, f).double() for f in many)
    power = right @ left
    for _ in range(40):
        # Repeated squaring: the columns converge to the leading eigenvector.
        power = power / power.sum().clamp_min(torch.finfo(power.dtype).tiny)
        power = power @ power
    b = power.sum(1)
    size = (b @ left @ b).clamp_min(torch.finfo(power.dtype).tiny)
    b, a = b / size.sqrt(), left @ b / size.sqrt()
    one, two = (torch.einsum("i,igkl->gkl", c.to(f), f) for c, f in zip((b, a), many, strict=True))
    return one, two
