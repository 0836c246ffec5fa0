"""Naive dense references: slow, short, and made without the library under test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

Tree = Any
Matvec = Callable[[Tree], Tree]


@contextmanager
def fixed_surroundings() -> Iterator[None]:
    """Attention that can be differentiated twice, and the masks of dropout that seed 0 gives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
        torch.backends.mha.set_fastpath_enabled(fast)


def flat(tree: Tree) -> Tensor:
    """One vector of a tree."""
    return torch.cat([leaf.reshape(-1) for leaf in tree_flatten(tree)[0]])


def rows(block: Tree) -> Tensor:
    """The rows ``(k, n)`` of a block."""
    found = tree_flatten(block)[0]
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in found], dim=1)


def block_like(like: Tree, flat_rows: Tensor) -> Tree:
    """The block of rows ``(k, n)``."""
    found, structure = tree_flatten(like)
    parts = flat_rows.split([leaf.numel() for leaf in found], dim=1)
    shaped = [p.reshape(-1, *leaf.shape) for p, leaf in zip(parts, found, strict=True)]
    return tree_unflatten(shaped, structure)


def gradient(loss: Callable[[Tree, Any], Tensor], params: Tree, batch: Any) -> Tensor:
    """The flat gradient."""
    found, structure = tree_flatten(params)
    inputs = [leaf.detach().clone().requires_grad_() for leaf in found]
    with fixed_surroundings():
        value = loss(tree_unflatten(inputs, structure), batch)
        return flat(torch.autograd.grad(value, inputs, materialize_grads=True))


def hessian(loss: Callable[[Tree, Any], Tensor], params: Tree, batch: Any) -> Tensor:
    """The Hessian ``(n, n)``: the gradient of each entry of the gradient."""
    found, structure = tree_flatten(params)
    inputs = [leaf.detach().clone().requires_grad_() for leaf in found]
    with fixed_surroundings():
        value = loss(tree_unflatten(inputs, structure), batch)
        entries = flat(
            torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        )
    return torch.stack(
        [
            flat(torch.autograd.grad(entry, inputs, retain_graph=True, materialize_grads=True))
            for entry in entries
        ]
    )


def jacobian(fn: Callable[[Tree], Tree], params: Tree) -> Tensor:
    """The Jacobian ``(m, n)`` of all outputs: the gradient of each."""
    found, structure = tree_flatten(params)
    inputs = [leaf.detach().clone().requires_grad_() for leaf in found]
    with fixed_surroundings():
        entries = flat(fn(tree_unflatten(inputs, structure)))
    return torch.stack(
        [
            flat(torch.autograd.grad(entry, inputs, retain_graph=True, materialize_grads=True))
            for entry in entries
        ]
    )


def gauss_newton(loss: Any, params: Tree, batch: Any) -> Tensor:
    """``J' H J`` of a loss with its two halves."""
    with fixed_surroundings():
        outputs = loss.outputs(params, batch)
    J = jacobian(lambda p: loss.outputs(p, batch), params)
    return J.mT @ hessian(loss.criterion, outputs, batch) @ J


def block_diagonal(dense: Tensor, like: Tree) -> Tensor:
    """The diagonal blocks of the leaves, and zeros elsewhere."""
    sizes = [leaf.numel() for leaf in tree_flatten(like)[0]]
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return dense * (block[:, None] == block)


def matrix(matvec: Matvec, like: Tree) -> Tensor:
    """The dense matrix of a matvec: its product with the identity."""
    identity = torch.eye(flat(like).numel(), dtype=flat(like).dtype)
    return rows(matvec(block_like(like, identity))).mT


def random_symmetric(n: int, *, seed: int = 0) -> Tensor:
    """A symmetric matrix of normal entries."""
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (a + a.mT) / 2


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The 2-norm of the difference, relative to the expected."""
    return float((found - expected).norm() / expected.norm())


def directional_derivative(
    function: Callable[[Tree], Tree], at: Tree, along: Tree, *, step: float = 0.05
) -> Tensor:
    """d/dt function(at + t along) at t = 0, flat, by Ridders' extrapolation of differences.

    Source: Ridders 1982, Accurate computation of F'(x) and F'(x)F''(x).
    """
    leaves, structure = tree_flatten(at)
    slopes = tree_flatten(along)[0]

    def difference(h: float) -> Tensor:
        ahead, behind = (
            flat(
                function(
                    tree_unflatten(
                        [x + s * d for x, d in zip(leaves, slopes, strict=True)], structure
                    )
                )
            )
            for s in (h, -h)
        )
        return (ahead - behind) / (2 * h)

    ratio, rows = 1.6, 14
    before = [difference(step)]
    best, smallest = before[0], float("inf")
    for i in range(1, rows):
        now = [difference(step / ratio**i)]
        for j in range(i):
            # The error of a central difference is a series in h^2; each column removes one term.
            factor = ratio ** (2 * (j + 1))
            now.append((factor * now[j] - before[j]) / (factor - 1))
            error = max(
                float((now[j + 1] - now[j]).abs().max()),
                float((now[j + 1] - before[j]).abs().max()),
            )
            if error < smallest:
                best, smallest = now[j + 1], error
        # More than any test asks for.
        if smallest <= 1e-11 * float(best.abs().max()):
            break
        before = now
    return best
