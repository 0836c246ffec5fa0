"""SciPy's solvers on matvecs, and the algorithms here on SciPy's operators, against dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import (
    LinearOperator,
    aslinearoperator,
    cg,
    eigsh,
    gmres,
    lobpcg,
    minres,
    onenormest,
    svds,
)

import hessfunc as hf
from hessfunc.compat.scipy import from_numpy, from_scipy, to_scipy
from hessfunc.trees import Matvec, Tree
from tests.cases import case, dense_hessian
from tests.reference import matrix, random_symmetric

MLP = case("mlp")
MATVEC = hf.hvp(MLP.loss)(MLP.params, MLP.batch)
H = dense_hessian("mlp").numpy()
N = len(H)
FLAT = torch.zeros(N, dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def sparse(n: int = 200) -> scipy.sparse.csr_array:
    """A tridiagonal matrix of well-separated positive eigenvalues."""
    beside = np.random.default_rng(0).uniform(0.5, 1.0, n - 1)
    diagonal = np.arange(1.0, n + 1) ** 1.5
    return scipy.sparse.csr_array(
        scipy.sparse.diags_array([beside, diagonal, beside], offsets=[-1, 0, 1])
    )


@pytest.fixture
def operator() -> LinearOperator:
    return to_scipy(MATVEC, MLP.params)


def test_products_are_those_of_the_dense_hessian(operator: LinearOperator) -> None:
    vector, block = normals(N), normals(N, 3)
    assert operator.shape == (N, N)
    assert operator.dtype == np.float64
    for found, expected in [
        (operator @ vector, H @ vector),
        (operator @ vector[:, None], H @ vector[:, None]),
        (operator @ block, H @ block),
        (operator.H @ vector, H @ vector),
        (operator.T @ block, H @ block),
        (operator.rmatvec(vector), H @ vector),
    ]:
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_a_vector_is_in_the_order_of_ravel(operator: LinearOperator) -> None:
    vector = hf.random_like(MLP.params, 1, seed=0)
    image = hf.ravel(MATVEC(vector))
    np.testing.assert_allclose(operator @ hf.ravel(vector).numpy(), image.numpy(), rtol=1e-12)


def test_a_block_is_one_pass() -> None:
    sizes: list[int] = []

    def counted(block: torch.Tensor) -> torch.Tensor:
        sizes.append(len(block))
        return 2 * block

    found = to_scipy(counted, torch.zeros(5, dtype=torch.float64)) @ normals(5, 4)
    assert sizes == [4]
    np.testing.assert_array_equal(found, 2 * normals(5, 4))


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_eigsh(operator: LinearOperator, which: str) -> None:
    values, vectors = eigsh(operator, k=4, which=which, v0=normals(N))
    exact = np.linalg.eigvalsh(H)
    order = {"LM": np.argsort(np.abs(exact))[-4:], "LA": np.arange(N)[-4:], "SA": np.arange(4)}
    np.testing.assert_allclose(values, np.sort(exact[order[which]]), rtol=0, atol=1e-8)
    np.testing.assert_allclose(H @ vectors, vectors * values, rtol=0, atol=1e-8)


def test_svds(operator: LinearOperator) -> None:
    found = svds(operator, k=3, v0=normals(N), return_singular_vectors=False)
    exact = np.linalg.svd(H, compute_uv=False)[:3]
    np.testing.assert_allclose(np.sort(found)[::-1], exact, rtol=0, atol=1e-8)


# SciPy takes a dense solver for so small a matrix, with columns in reverse order.
@pytest.mark.filterwarnings("ignore:The problem size 12")
def test_svds_by_lobpcg() -> None:
    given = random_symmetric(12, seed=0)
    found = svds(to_scipy(hf.dense(given), given[0]), k=3, solver="lobpcg", v0=normals(12))
    exact = np.linalg.svd(given.numpy(), compute_uv=False)[:3]
    np.testing.assert_allclose(np.sort(found[1])[::-1], exact, rtol=1e-6)


def test_lobpcg(operator: LinearOperator) -> None:
    values, _ = lobpcg(operator, normals(N, 4), tol=1e-9, maxiter=300)
    exact = np.sort(np.linalg.eigvalsh(H))[::-1][:4]
    np.testing.assert_allclose(np.sort(values)[::-1], exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("solve", "damping"),
    [
        (lambda operator, b: cg(operator, b, rtol=1e-12), 2.0),
        (lambda operator, b: minres(operator, b, rtol=1e-13, maxiter=10 * N), 0.3),
        (lambda operator, b: gmres(operator, b, rtol=1e-12, restart=N), 0.3),
    ],
    ids=["cg", "minres", "gmres"],
)
def test_solvers(solve: Callable[[LinearOperator, Any], Any], damping: float) -> None:
    damped = H + damping * np.eye(N)
    b = normals(N)
    x, status = solve(to_scipy(hf.matvecs.shift(MATVEC, damping), MLP.params), b)
    assert status == 0
    np.testing.assert_allclose(x, np.linalg.solve(damped, b), rtol=0, atol=1e-8)


def test_onenormest(operator: LinearOperator) -> None:
    # Of many columns at once the estimate is exact.
    found = onenormest(operator, t=20)
    np.testing.assert_allclose(found, np.abs(H).sum(0).max(), rtol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, np.float64),
        (torch.float32, np.float32),
        (torch.bfloat16, np.float32),
        (torch.float16, np.float32),
    ],
)
def test_the_dtype_is_that_of_the_parameters(dtype: torch.dtype, expected: type) -> None:
    operator = to_scipy(hf.matvecs.scale(lambda block: block, 3.0), torch.zeros(4, dtype=dtype))
    assert operator.dtype == expected
    for given in (np.float32, np.float64, np.int64):
        found = operator @ np.arange(4, dtype=given)
        assert found.dtype == expected
        np.testing.assert_array_equal(found, [0, 3, 6, 9])


@pytest.mark.parametrize(
    "given",
    [
        normals(N)[::-1],
        normals(N, 4)[:, ::-1],
        normals(4, N).T[::-1, ::2],
        normals(N).astype(">f8"),
        normals(N, 2).astype(np.longdouble),
        normals(N, 2).astype(np.float16),
        np.arange(N, dtype=np.uint16),
    ],
    ids=[
        "reversed",
        "columns",
        "both",
        "big-endian",
        "longdouble",
        "float16",
        "uint16",
    ],
)
def test_any_array_is_a_vector(operator: LinearOperator, given: NDArray[Any]) -> None:
    found = operator @ given
    assert found.dtype == np.float64
    assert found.shape == given.shape
    np.testing.assert_allclose(found, H @ given.astype(np.float64), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("matvec", [hf.dense(torch.eye(3)), hf.batched(lambda v: 2 * v)])
def test_no_vectors_have_no_products(matvec: Matvec) -> None:
    found = to_scipy(matvec, torch.zeros(3)) @ np.empty((3, 0))
    assert (found.shape, found.dtype) == ((3, 0), np.float32)


def test_products_leave_what_they_are_given() -> None:
    frozen = normals(4)
    frozen.flags.writeable = False
    found = to_scipy(lambda block: block, torch.zeros(4, dtype=torch.float64)) @ frozen
    found += 1
    np.testing.assert_array_equal(frozen, normals(4))


@pytest.mark.gpu
def test_vectors_are_moved_to_the_device_and_back() -> None:
    matvec, like = hf.dense(torch.from_numpy(H).cuda()), FLAT.cuda()
    np.testing.assert_allclose(to_scipy(matvec, like) @ np.eye(N), H, rtol=1e-12)
    found = from_scipy(H)(torch.eye(N, dtype=torch.float64, device="cuda"))
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu().numpy(), H, rtol=1e-12)


def test_vectors_of_another_kind_are_refused(operator: LinearOperator) -> None:
    with pytest.raises(TypeError, match="the operator is real, but the vector is complex"):
        operator @ (1j * normals(N))
    with pytest.raises(ValueError, match="dimension mismatch"):
        operator @ normals(N + 1)


def test_a_product_that_is_not_finite_is_refused() -> None:
    operator = to_scipy(lambda block: block / 0, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        operator @ np.ones(3)


SOURCES: dict[str, Callable[[scipy.sparse.csr_array], Any]] = {
    "csr_array": lambda a: a,
    "coo_matrix": scipy.sparse.coo_matrix,
    "lil_array": lambda a: a.tolil(),
    "dia_array": scipy.sparse.dia_array,
    "dia_matrix": scipy.sparse.dia_matrix,
    "dok_array": lambda a: a.todok(),
    "bsr_array": scipy.sparse.bsr_array,
    "numpy": lambda a: a.toarray(),
    "numpy, columns first": lambda a: np.asfortranarray(a.toarray()),
    "LinearOperator": aslinearoperator,
    "a function": lambda a: LinearOperator(a.shape, matvec=lambda v: a @ v, dtype=a.dtype),
}


@pytest.mark.parametrize("like", [FLAT, MLP.params], ids=["flat", "tree"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_matvec_is_that_of_the_operator(source: str, like: Tree) -> None:
    expected = sparse(N)
    found = matrix(from_scipy(SOURCES[source](expected)), like)
    np.testing.assert_allclose(found.numpy(), expected.toarray(), rtol=1e-14)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (np.float32, torch.float32),
        (np.float64, torch.float64),
        (np.int64, torch.float64),
        (np.uint8, torch.float64),
        (np.bool_, torch.float64),
    ],
)
def test_products_are_in_the_dtype_of_the_operator(kind: type, dtype: torch.dtype) -> None:
    given = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=kind)
    expected = torch.from_numpy(given.astype(float)).to(dtype)
    for source in (given, scipy.sparse.csr_array(given)):
        torch.testing.assert_close(from_scipy(source)(torch.eye(3, dtype=dtype)), expected)
        other = torch.float64 if dtype == torch.float32 else torch.float32
        with pytest.raises(TypeError, match=f"pass `like` in {dtype}, such as `torch.zeros\\(3, "):
            from_scipy(source)(torch.eye(3, dtype=other))


def test_an_identity_does_not_give_back_the_block_itself() -> None:
    block = torch.eye(3, dtype=torch.float64)
    from_scipy(scipy.sparse.linalg.aslinearoperator(np.eye(3)))(block).zero_()
    identity = LinearOperator((3, 3), matvec=lambda v: v, matmat=lambda v: v, dtype=float)
    from_scipy(identity)(block).zero_()
    assert torch.equal(block, torch.eye(3, dtype=torch.float64))


def test_round_trips() -> None:
    expected = sparse(N)
    operator = to_scipy(from_scipy(expected), FLAT)
    np.testing.assert_allclose(operator @ np.eye(N), expected.toarray(), rtol=1e-14)
    back = from_scipy(to_scipy(MATVEC, MLP.params))
    np.testing.assert_allclose(matrix(back, MLP.params).numpy(), H, rtol=1e-10, atol=1e-12)


def test_eigenvalues_and_density_of_a_sparse_matrix() -> None:
    given = sparse()
    exact = np.linalg.eigvalsh(given.toarray())
    like = torch.zeros(200, dtype=torch.float64)
    top = hf.lanczos(from_scipy(given), like, k=4, which="BE", rtol=1e-8, seed=0)
    assert top.converged.all()
    np.testing.assert_allclose(np.asarray(top.values), exact[[-1, -2, 1, 0]], rtol=1e-10)
    vectors = np.asarray(top.vectors)
    residual = given @ vectors.T - vectors.T * np.asarray(top.values)
    assert np.abs(residual).max() < 1e-6
    density = hf.slq(from_scipy(given), like, probes=20, steps=40, seed=0)
    low, high = density.count_above(float(np.median(exact)))
    assert low <= 100 <= high
    low, high = density.mean(torch.sqrt).interval(0.999)
    assert low <= np.sqrt(exact).mean() <= high


def test_a_solution_is_scipys() -> None:
    given, b = sparse(), normals(200)
    found = hf.cg(from_scipy(given), torch.from_numpy(b), rtol=1e-12)
    np.testing.assert_allclose(np.asarray(found.x), np.linalg.solve(given.toarray(), b), rtol=1e-9)


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (np.ones((3, 4)), ValueError, r"shape \(3, 4\), which is not square"),
        (np.triu(np.ones((3, 3))), ValueError, "not symmetric"),
        (scipy.sparse.eye_array(3, k=1).tocsr(), ValueError, "not symmetric"),
        (np.eye(3, dtype=complex), TypeError, "dtype complex128"),
        (np.eye(3, dtype=np.float16), TypeError, "dtype float16"),
        (np.eye(3, dtype=np.longdouble), TypeError, "float32 or float64"),
        (torch.eye(3), TypeError, r"use `dense\(A\)`"),
        ("matrix", TypeError, "a str is not a SciPy operator"),
        (np.diag([1.0, np.nan]), ValueError, "NaN or infinite"),
        (scipy.sparse.diags_array([1.0, np.inf]), ValueError, "NaN or infinite"),
        (scipy.sparse.diags_array([1.0], offsets=[1], shape=(2, 2)), ValueError, "not symmetric"),
    ],
    ids=[
        *("shape", "array", "sparse", "complex", "half", "long double", "tensor", "text"),
        *("NaN", "infinite", "diagonals"),
    ],
)
def test_other_operators_are_refused(operator: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_scipy(operator)


def test_an_operator_that_is_complex_in_truth_is_refused() -> None:
    operator = LinearOperator((3, 3), matvec=lambda v: 1j * v, dtype=float)
    with pytest.raises(TypeError, match="complex128"):
        from_scipy(operator)(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("matvec", [from_scipy(np.eye(4)), from_scipy(sparse(4))])
def test_vectors_of_another_length_are_refused(matvec: Matvec) -> None:
    with pytest.raises(ValueError, match="takes vectors with 4 entries, but got 5"):
        matvec(torch.eye(5, dtype=torch.float64))


def test_random_matrices_are_dense_too() -> None:
    given = random_symmetric(9, seed=3)
    torch.testing.assert_close(matrix(from_scipy(given.numpy()), given[0]), given)


# Functions of arrays


class OtherArrays:
    """A stand-in for the module and the arrays of CuPy, which are not those of NumPy."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape

    @classmethod
    def from_dlpack(cls, tensor: torch.Tensor) -> OtherArrays:
        return cls(torch.utils.dlpack.from_dlpack(tensor))

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


FUNCTIONS: dict[str, Callable[[NDArray[Any]], Callable[[Any], Any]]] = {
    "product": lambda a: lambda v: a @ v,
    "read-only": lambda a: lambda v: np.broadcast_to(a @ v, v.shape),
    "reversed": lambda a: lambda v: (a @ v)[::-1][::-1],
    "strided": lambda a: lambda v: np.repeat(a @ v, 2)[::2],
    "list of numbers": lambda a: lambda v: list(a @ v),
}


@pytest.mark.parametrize("like", [FLAT, MLP.params], ids=["flat", "tree"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_matvec_is_that_of_the_function(function: str, like: Tree) -> None:
    matvec = from_numpy(FUNCTIONS[function](H), n=N)
    np.testing.assert_allclose(matrix(matvec, like).numpy(), H, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_of_arrays_of_another_module(dtype: torch.dtype) -> None:
    given = random_symmetric(5, seed=0).to(dtype)
    function = lambda v: OtherArrays(given @ v.tensor)  # noqa: E731
    matvec = from_numpy(function, n=5, xp=OtherArrays)  # type: ignore[arg-type]
    torch.testing.assert_close(matrix(matvec, given[0]), given)
    identity = from_numpy(lambda v: v, n=5, xp=OtherArrays)  # type: ignore[arg-type]
    block = torch.ones(2, 5, dtype=dtype)
    identity(block).zero_()
    assert bool((block == 1).all())


def test_a_function_gets_the_memory_of_the_vector_and_its_result_is_copied() -> None:
    block, seen = torch.ones(2, 3, dtype=torch.float64), []
    kept = np.zeros(3)

    def identity(v: NDArray[Any]) -> NDArray[Any]:
        seen.append(v.__array_interface__["data"][0])
        kept[:] = v
        return kept

    first = from_numpy(identity, n=3)(block)
    assert seen == [row.data_ptr() for row in block]
    kept[:] = 5.0
    assert torch.equal(first, block)


def test_algorithms_on_a_function_of_arrays() -> None:
    n = 64
    symbol = 2 - 2 * np.cos(2 * np.pi * np.arange(n // 2 + 1) / n)
    circulant = from_numpy(lambda v: np.fft.irfft(symbol * np.fft.rfft(v), n), n=n)
    like = torch.zeros(n, dtype=torch.float64)
    top = hf.lanczos(circulant, like, k=1, seed=0, rtol=1e-8)
    np.testing.assert_allclose(np.asarray(top.values), [4.0], rtol=1e-10)
    assert not hf.check(circulant, like).problems


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_numpy(lambda v: v, n=3), ValueError, "takes vectors with 3 entries, but got"),
        (lambda: from_numpy(lambda v: v[:2], n=N), ValueError, r"returns an array of shape \(2,\)"),
        (lambda: from_numpy(lambda v: v[:, None], n=N), ValueError, rf"shape \({N}, 1\)"),
        (lambda: from_numpy(np.float32, n=N), TypeError, "must be a function of one array"),
        (lambda: from_numpy(lambda v: v.astype("f4"), n=N), TypeError, "float32 for a vector of"),
        (
            lambda: from_numpy(lambda v: 1j * v, n=N),
            TypeError,
            "complex128 for a vector of float64",
        ),
        (lambda: from_numpy(lambda v: None, n=N), TypeError, "returns object for a vector of"),
        (lambda: from_numpy(np.eye(3), n=3), TypeError, "must be a function of one array"),
        (lambda: from_numpy(lambda v: v, n=0), ValueError, "n=0: it must be at least 1"),
        (lambda: from_numpy(lambda v: v, n=2.5), ValueError, "whole number"),
    ],
)
def test_other_functions_are_refused(
    call: Callable[[], Matvec], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()(FLAT[None])


def test_vectors_that_numpy_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="dtype torch.bfloat16: pass `like` in torch.float32"):
        from_numpy(lambda v: v, n=3)(torch.ones(1, 3, dtype=torch.bfloat16))


def test_a_function_that_writes_into_its_argument_is_refused() -> None:
    def doubled(v: NDArray[Any]) -> NDArray[Any]:
        v *= 2
        return v

    with pytest.raises(ValueError, match="changes its block in place"):
        hf.hutchinson(from_numpy(doubled, n=N), FLAT, seed=0)
    scaled = LinearOperator((N, N), matvec=doubled, matmat=doubled, dtype=np.float64)
    with pytest.raises(ValueError, match="changes its block in place"):
        hf.hutchinson(from_scipy(scaled), FLAT, seed=0)


MATRICES: dict[str, Callable[[NDArray[Any]], Matvec]] = {
    "from_scipy": from_scipy,
    "from_numpy": lambda a: from_numpy(lambda v: a @ v, n=len(a)),
}


@pytest.mark.parametrize("made", MATRICES)
def test_products_keep_the_graph_of_the_vectors(made: str) -> None:
    given = random_symmetric(5, seed=0)
    matvec = MATRICES[made](given.numpy())
    v = torch.arange(1.0, 6.0, dtype=torch.float64)

    def quadratic(x: torch.Tensor) -> torch.Tensor:
        return hf.inner(x, hf.apply(matvec, x))

    torch.testing.assert_close(torch.func.grad(quadratic)(v), 2 * given @ v)
    torch.testing.assert_close(torch.func.hessian(quadratic)(v), 2 * given)
    torch.testing.assert_close(torch.func.jvp(quadratic, (v,), (v,))[1], 2 * v @ given @ v)
    block = torch.stack([v, -v])
    mapped = torch.func.vmap(lambda x: hf.apply(matvec, x))(block)
    torch.testing.assert_close(mapped, block @ given)
    leaf = v.clone().requires_grad_()
    quadratic(leaf).backward()
    torch.testing.assert_close(leaf.grad, 2 * given @ v)


@pytest.mark.parametrize("xp", [None, "cupy"])
def test_what_is_no_module_of_arrays_is_refused(xp: Any) -> None:
    with pytest.raises(TypeError, match="has no `from_dlpack`: pass a module, such as xp=cupy"):
        from_numpy(lambda v: v, n=3, xp=xp)


def test_a_function_of_arrays_is_told_from_one_of_tensors() -> None:
    given, like = sparse(6), torch.zeros(6, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"one vector.*pass hessfunc.compat.from_numpy\(f, n=n\)"):
        hf.lanczos(given.dot, like, k=1)
    array = given.toarray()
    for call in (hf.check, lambda f, v: hf.apply(f, v)):
        with pytest.raises(TypeError, match=r"from_numpy\(f, n=n\) for a function f of arrays"):
            call(lambda v: array @ v, like)

    def of_jax(v: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"Cannot interpret value of type {type(v)} as an abstract array")

    with pytest.raises(TypeError, match="xp=jax.numpy"):
        hf.lanczos(of_jax, like, k=1)
