"""Arguments as they come in: scalars of NumPy and torch, and what is said of wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf

D = torch.float64


N = torch.arange(1.0, 31.0, dtype=D)


MATRIX = torch.diag(N)


MATVEC = hf.dense(MATRIX)


LIKE = torch.zeros(30, dtype=D)


MODEL = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


MODEL_FN, PARAMS = hf.functional(MODEL)


LOSS = hf.supervised(MODEL_FN, nn.functional.cross_entropy)


BATCH = torch.randn(8, 5), torch.arange(8) % 3


def gradient_in_place(v: Tensor) -> Tensor:
    array = v.numpy()
    array *= N.numpy()
    return torch.from_numpy(array)


# Each call, and what its error says.
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a matrix": (lambda: hf.lanczos(MATRIX, LIKE), r"hessfunc\.dense\(matrix\)"),
    "an array": (lambda: hf.lanczos(MATRIX.numpy(), LIKE), r"from_scipy\(matrix\)"),
    "a model": (lambda: hf.lanczos(MODEL, PARAMS), r"not a module \(Sequential\).*functional"),
    "a loss": (lambda: hf.check(LOSS, PARAMS), "a loss, not a matvec"),
    "a curvature function": (lambda: hf.hutchinson(hf.hvp(LOSS), PARAMS), "not a matvec: pass"),
    "two arguments more": (lambda: hf.slq(lambda a, b, c: a, LIKE), "function of a vector block"),
    "a matvec of batches": (lambda: hf.over_batches(MATVEC), "curvature function .*like a matvec"),
    "a loss of batches": (lambda: hf.over_batches(LOSS), r"pass hessfunc\.hvp\(loss\)"),
    "the factory of batches": (lambda: hf.over_batches(hf.hvp), r"pass hessfunc\.hvp\(loss\)"),
    "params, not a module": (lambda: hf.functional(PARAMS), "model must be a module"),
    "a module, not params": (lambda: hf.split(MODEL, "0*"), "dict of names and tensors"),
    "a module as like": (lambda: hf.lanczos(MATVEC, MODEL), r"functional\(model\)"),
    "a generator": (lambda: hf.ravel(MODEL.parameters()), r"only once: pass a dict"),
    "an array as like": (lambda: hf.lanczos(MATVEC, np.zeros(30)), "from_numpy"),
    "an empty tree": (lambda: hf.lanczos(MATVEC, {}), "without tensors"),
    "a tree of numbers": (lambda: hf.lanczos(MATVEC, {"a": 1.0}), "a tree with 1.0"),
    "integers": (lambda: hf.lanczos(MATVEC, LIKE.long()), "dtype torch.int64"),
    "complex numbers": (lambda: hf.lanczos(MATVEC, LIKE + 0j), "dtype torch.complex128"),
    "meta": (lambda: hf.lanczos(MATVEC, LIKE.to("meta")), "like is on the meta device"),
    "a text": (lambda: hf.lanczos(MATVEC, LIKE, rtol="0.1"), "rtol=0.1, for instance"),
    "half a pair": (lambda: hf.lanczos(MATVEC, LIKE, k=2.5), "k=2.5: it must be a whole number"),
    "a bool": (lambda: hf.lanczos(MATVEC, LIKE, k=True), "k must be a whole number, not True"),
    "endless": (
        lambda: hf.hutchinson(MATVEC, LIKE, max_matvecs=float("inf")),
        "max_matvecs=inf: it must be a whole number",
    ),
    "NaN": (lambda: hf.cg(MATVEC, LIKE, damping=np.float32("nan")), "damping=nan: .* finite"),
    "huge": (lambda: hf.lanczos(MATVEC, LIKE, k=10**30), r"k has 100 bits: .* below 2\^63"),
    "a flag": (
        lambda: hf.over_batches(hf.hvp(LOSS), keep="yes"),
        "True, False or 'auto', not 'yes'",
    ),
    "a seed": (lambda: hf.hutchinson(MATVEC, LIKE, seed="a"), "seed must be a whole number"),
    "a dtype": (lambda: hf.lanczos(MATVEC, LIKE, basis_dtype="float32"), "torch.float32"),
    "a device": (lambda: hf.lanczos(MATVEC, LIKE, basis_device="gpu"), "basis_device='gpu' is not"),
    "no path": (lambda: hf.lanczos(MATVEC, LIKE, checkpoint=3), "checkpoint must be a path"),
    "no space": (lambda: hf.lanczos(MATVEC, LIKE, space="mesh"), r"hessfunc\.sharded"),
    "a callback": (lambda: hf.lanczos(MATVEC, LIKE, callback=3), "callback must be a function"),
    "no eigenpairs": (lambda: hf.hutchinson(MATVEC, LIKE, deflate=MATRIX), "must be Eigenpairs"),
    "a class": (lambda: hf.supervised(MODEL_FN, nn.MSELoss), r"criterion=MSELoss\(\)"),
    "a module as loss": (lambda: hf.hvp(MODEL), "is a module, not a function of"),
    "one batch": (lambda: hf.ggn_diagonal(LOSS, PARAMS, 3), "list of batches or a DataLoader"),
    "other names": (lambda: MODEL_FN({"w": torch.ones(1)}, BATCH[0]), "no parameter named w"),
    "no dict": (lambda: MODEL_FN([torch.ones(1)], BATCH[0]), "params is a list"),
    "an option": (lambda: hf.lanczos(MATVEC, LIKE, tol=1), "lanczos has no option 'tol'"),
    "NaN in a matrix": (lambda: hf.dense(MATRIX * float("nan")), "NaN or infinite"),
    "a sparse matrix": (lambda: hf.dense(MATRIX.to_sparse()), "to_dense"),
    "another size": (lambda: hf.slq(MATVEC, torch.zeros(5)), "of 30 entries, but got one of 5"),
    "a function of one vector": (
        lambda: hf.hutchinson(lambda v: MATRIX @ v, LIKE, block_size=4),
        r"one vector, but not a block .*hessfunc.batched\(f\)",
    ),
    "a sparse product": (
        lambda: hf.hutchinson(lambda v: v.to_sparse(), LIKE),
        "layout torch.sparse_coo: return a dense tensor",
    ),
    "all arguments at once": (
        lambda: hf.hvp(LOSS, PARAMS, BATCH),  # type: ignore[call-arg]
        r"call hvp\(loss\)\(params, batch\)",
    ),
    "a criterion first": (
        lambda: hf.supervised(nn.functional.mse_loss, MODEL_FN),
        "the criterion last",
    ),
    "a dtype of integers": (
        lambda: hf.functional(MODEL, dtype=torch.int8),
        "dtype=torch.int8: choose a floating-point dtype",
    ),
    "a NumPy function": (
        lambda: hf.compat.from_scipy(lambda v: v),
        r"a function is not a SciPy operator.*from_numpy\(f, n=n\)",
    ),
    "of one vector": (
        lambda: hf.hutchinson(hf.batched(lambda v: MATRIX.numpy() @ v), LIKE),
        r"from_numpy\(f, n=n\)",
    ),
    "of a NumPy matrix": (lambda: hf.slq(lambda v: MATRIX.numpy() @ v, LIKE), r"from_scipy\(A\)"),
    "of one vector, in a loop": (
        lambda: hf.hutchinson(hf.batched(lambda v: v.numpy(), chunk_size=1), LIKE),
        r"from_numpy\(f, n=n\)",
    ),
    "in place": (lambda: hf.hutchinson(gradient_in_place, LIKE), "in place: return a new one"),
    "in place by .data": (
        lambda: hf.hutchinson(lambda v: (v.data.mul_(2), v)[1], LIKE),
        "in place: return a new one",
    ),
    "reversed in place": (
        lambda: hf.hutchinson(lambda v: (np.copyto(v.numpy(), v.flip(1)), v)[1], LIKE),
        "in place: return a new one",
    ),
    "products of integers": (lambda: hf.hutchinson(lambda v: v.long(), LIKE), "call .float()"),
    "complex products": (lambda: hf.hutchinson(lambda v: v + 0j, LIKE), "take its real part"),
    "arrays as products": (lambda: hf.hutchinson(lambda v: v.numpy(), LIKE), "from_numpy"),
    "no products": (lambda: hf.hutchinson(lambda v: None, LIKE), "not like its block"),
    "one product": (lambda: hf.hutchinson(lambda v: v[0], LIKE), "shape of one vector"),
    "a number": (lambda: hf.apply(lambda v: v.sum(), LIKE), "not like its block"),
    "no draw": (lambda: hf.sampled_trace(lambda i: i, LIKE), "the draw is of type int"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named(name: str) -> None:
    call, words = CALLS[name]
    with pytest.raises((TypeError, ValueError)) as refusal:
        call()
    message = str(refusal.value)
    assert re.search(words, message), message
    assert "\n" not in message
    assert len(message) < 300


def test_products_that_carry_a_graph_are_taken() -> None:
    weight = nn.Parameter(MATRIX)
    found = hf.lanczos(lambda v: v @ weight, LIKE, k=1, seed=0)
    assert found.values[0] == pytest.approx(30.0, rel=1e-6)
    assert not found.vectors.requires_grad
    mean = hf.over_batches(lambda params, batch: lambda v: v @ weight)(LIKE, [N])
    trace = hf.hutchinson(mean, LIKE, seed=0)
    # Every probe of signs gives the trace of a diagonal matrix.
    assert trace.value == pytest.approx(465.0)


def test_vectors_with_a_gradient_are_raveled_with_it() -> None:
    tree = {"a": torch.ones(2, 3, requires_grad=True), "b": torch.ones((), requires_grad=True)}
    (hf.ravel(tree) * torch.arange(7.0)).sum().backward()
    assert tree["a"].grad.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tree["b"].grad == 6
    v = torch.ones(30, dtype=D, requires_grad=True)
    hf.apply(MATVEC, v).square().sum().div(2).backward()
    assert torch.equal(v.grad, N**2)
