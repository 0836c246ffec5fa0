from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.trees import Matvec
from tests.cases import case, dense_hessian
from tests.reference import block_diagonal, matrix, random_symmetric, relative_error

A, B = random_symmetric(8, seed=0), random_symmetric(8, seed=1)
EYE = torch.eye(8, dtype=torch.float64)
FLAT = torch.zeros(8, dtype=torch.float64)
TREE = {
    "w": torch.zeros(2, 3, dtype=torch.float64),
    "b": [torch.zeros(2, dtype=torch.float64)],
}


@pytest.mark.parametrize("like", [FLAT, TREE], ids=["flat", "tree"])
@pytest.mark.parametrize(
    ("matvec", "expected"),
    [
        (hf.dense(A), A),
        (hf.matvecs.shift(hf.dense(A), -0.3), A - 0.3 * EYE),
        (hf.matvecs.scale(hf.dense(A), -2.0), -2.0 * A),
        (hf.matvecs.add(hf.dense(A)), A),
        (hf.matvecs.add(hf.dense(A), hf.dense(B), hf.dense(EYE)), A + B + EYE),
        (
            hf.matvecs.scale(hf.matvecs.add(hf.matvecs.shift(hf.dense(A), 1.0), hf.dense(B)), 0.5),
            (A + EYE + B) / 2,
        ),
    ],
    ids=["dense", "shift", "scale", "one term", "add", "composition"],
)
def test_matvecs_are_those_of_their_matrices(matvec: Matvec, expected: Tensor, like: Any) -> None:
    torch.testing.assert_close(matrix(matvec, like), expected)


@pytest.mark.parametrize("like", [FLAT, TREE], ids=["flat", "tree"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_deflate_moves_eigenpairs_to_zero(like: Any, k: int) -> None:
    values, vectors = torch.linalg.eigh(A)
    pairs = SimpleNamespace(values=values[-k:], vectors=hf.unravel(vectors[:, -k:].mT, like))
    deflated = matrix(hf.matvecs.deflate(hf.dense(A), pairs), like)
    left = torch.cat([values[:-k], torch.zeros(k, dtype=torch.float64)])
    assert relative_error(deflated, vectors @ torch.diag(left) @ vectors.mT) < 1e-12 or k == 8
    torch.testing.assert_close(torch.linalg.eigvalsh(deflated), left.sort().values)


def test_precondition_divides_by_the_root_of_the_diagonal_on_both_sides() -> None:
    diagonal = torch.rand(8, dtype=torch.float64) + 0.5
    found = matrix(hf.matvecs.precondition(hf.dense(A), hf.unravel(diagonal, TREE)), TREE)
    torch.testing.assert_close(found, A / diagonal.outer(diagonal).sqrt())


def test_preconditioned_eigenvalues_are_those_of_the_quotient() -> None:
    diagonal = torch.rand(8, dtype=torch.float64) + 0.5
    found = matrix(hf.matvecs.precondition(hf.dense(A), hf.unravel(diagonal, TREE)), TREE)
    expected = torch.linalg.eigvals(A / diagonal[:, None]).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(found), expected)


@pytest.mark.parametrize("entry", [0.0, -1.0, float("nan")])
def test_a_preconditioner_that_is_not_positive_is_refused(entry: float) -> None:
    with pytest.raises(ValueError, match="must be positive: add a damping"):
        hf.matvecs.precondition(hf.dense(A), torch.tensor([1.0, entry]))


THREE = {name: torch.zeros(n, dtype=torch.float64) for name, n in (("a", 3), ("b", 1), ("c", 4))}


@pytest.mark.parametrize(
    ("groups", "of_column"),
    [
        (None, [0, 0, 0, 1, 2, 2, 2, 2]),
        ({"one": ["a", "c"], "two": ["b"]}, [0, 0, 0, 1, 0, 0, 0, 0]),
        ({"one": ["c"]}, [-1, -1, -1, -1, 0, 0, 0, 0]),
        ({"all": ["a", "b", "c"]}, [0] * 8),
    ],
    ids=["each leaf", "two groups", "some leaves", "all"],
)
def test_per_block_keeps_the_diagonal_blocks_alone(groups: Any, of_column: list[int]) -> None:
    group = torch.tensor(of_column)
    kept = (group[:, None] == group) & (group[:, None] >= 0)
    torch.testing.assert_close(
        matrix(hf.matvecs.per_block(hf.dense(A), THREE, groups), THREE), A * kept
    )


@pytest.mark.parametrize("name", ["conv", "scaled dot product attention", "tied head"])
def test_per_block_of_a_hessian_is_its_diagonal_blocks(name: str) -> None:
    found = case(name)
    matvec = hf.matvecs.per_block(hf.hvp(found.loss)(found.params, found.batch), found.params)
    product = matrix(matvec, found.params)
    assert relative_error(product, block_diagonal(dense_hessian(name), found.params)) < 1e-8


def test_per_block_takes_one_pass() -> None:
    passes = []

    def counted(block: Any) -> Any:
        passes.append(len(block["a"]))
        return hf.dense(A)(block)

    hf.matvecs.per_block(counted, THREE)(hf.random_like(THREE, 2, seed=0))
    assert passes == [6]


def test_per_block_takes_any_tree() -> None:
    found = matrix(hf.matvecs.per_block(hf.dense(A), TREE), TREE)
    torch.testing.assert_close(found, block_diagonal(A, TREE))
    grouped = hf.matvecs.per_block(hf.dense(A), TREE, {"all": ["w", "b.0"]})
    torch.testing.assert_close(matrix(grouped, TREE), A)


@pytest.mark.parametrize(
    ("groups", "message"),
    [({"one": ["a", "d"]}, "in blocks: d"), ({"one": ["a", "b"], "two": ["b"]}, "in blocks: b")],
)
def test_blocks_of_leaves_that_do_not_part_them_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.matvecs.per_block(hf.dense(A), THREE, groups)


def test_apply_is_the_product_with_one_tree() -> None:
    v = torch.randn(8, dtype=torch.float64)
    out = hf.apply(hf.dense(A), hf.unravel(v, TREE))
    torch.testing.assert_close(hf.ravel(out), A @ v)
    assert out["w"].shape == (2, 3)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_batched_makes_a_matvec_of_a_function_of_one_vector(chunk_size: int | None) -> None:
    def fn(tree: Any) -> Any:
        assert tree["w"].shape == (2, 3)
        return hf.unravel(A @ torch.cat([tree["w"].flatten(), tree["b"][0]]), TREE)

    torch.testing.assert_close(matrix(hf.batched(fn, chunk_size=chunk_size), TREE), A)


def test_a_loop_survives_what_vmap_does_not() -> None:
    def fn(v: Tensor) -> Tensor:
        return torch.from_numpy(A.numpy() @ v.numpy())

    torch.testing.assert_close(matrix(hf.batched(fn, chunk_size=1), FLAT), A)


def test_dense_products_are_in_the_dtype_of_the_tree() -> None:
    v = torch.randn(3, 8)
    out = hf.dense(A)(v)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, v @ A.float())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 4), r"shape \(3, 4\) is not square"),
        (torch.zeros(3), r"shape \(3,\) is not square"),
        (torch.triu(torch.ones(3, 3)), r"not symmetric: pass \(A \+ A.T\) / 2"),
    ],
)
def test_a_matrix_that_is_not_symmetric_is_refused(wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.dense(wrong)


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="add needs at least one matvec"):
        hf.matvecs.add()


def test_blocks_go_in_unchanged() -> None:
    v = torch.randn(3, 8, dtype=torch.float64)
    before = v.clone()
    pairs = SimpleNamespace(values=torch.ones(1), vectors=EYE[:1])
    hf.matvecs.deflate(
        hf.matvecs.add(hf.matvecs.scale(hf.matvecs.shift(hf.dense(A), 1.0), 2.0), hf.dense(B)),
        pairs,
    )(v)
    assert torch.equal(v, before)


class Kernel:
    """A lazy matrix with the interface of GPyTorch's ``linear_operator.LinearOperator``."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    shape = property(lambda self: self._matrix.shape)
    dtype = property(lambda self: self._matrix.dtype)

    def matmul(self, other: Tensor) -> Tensor:
        return self._matrix @ other

    __matmul__ = matmul


@pytest.mark.parametrize("like", [FLAT, TREE], ids=["flat", "tree"])
@pytest.mark.parametrize(
    "made", [Kernel, Tensor.to_sparse, Tensor.to_sparse_csr], ids=["kernel", "coo", "csr"]
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_linear_operator_multiplies_a_block_in_one_product(made: Any, like: Any) -> None:
    torch.testing.assert_close(matrix(hf.matvecs.from_linear_operator(made(A)), like), A)


def test_the_product_of_a_linear_operator_does_not_share_the_memory_of_the_block() -> None:
    class Identity(Kernel):
        def __matmul__(self, other: Tensor) -> Tensor:
            return other

    block = torch.ones(2, 8, dtype=torch.float64)
    hf.matvecs.from_linear_operator(Identity(A))(block).zero_()
    assert bool((block == 1).all())


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (A, TypeError, r"use `dense\(A\)`"),
        (A.numpy(), TypeError, r"use `compat.from_scipy\(operator\)`"),
        (A.long().to_sparse(), TypeError, r"dtype torch.int64: .*`operator.double\(\)`"),
        (lambda v: v, TypeError, r"a function is no linear operator.*batched\(f\)"),
        (Kernel(A[:3]), ValueError, r"shape \(3, 8\), which is not square"),
        (Kernel(torch.stack([A, A])), ValueError, "one of a batch"),
        (Kernel(A[:3, :3]), ValueError, "takes vectors of 3 entries, but got one of 8"),
        (Kernel(A.float()), TypeError, r"pass `like` in torch.float32, such as `torch.zeros\(8"),
    ],
)
def test_other_operators_are_refused(operator: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hf.matvecs.from_linear_operator(operator)(FLAT[None])


def test_a_product_of_another_shape_is_refused() -> None:
    class Wrong(Kernel):
        def __matmul__(self, other: Tensor) -> Tensor:
            return other[0]

    with pytest.raises(ValueError, match=r"shape \(8, 1\) is torch.Size\(\[1\]\)"):
        hf.matvecs.from_linear_operator(Wrong(A))(FLAT[None])


def test_the_function_for_a_linear_operator_is_named_where_a_matvec_is_due() -> None:
    with pytest.raises(TypeError, match=r"pass hessfunc.matvecs.from_linear_operator"):
        hf.lanczos(Kernel(A), FLAT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"matvecs.from_linear_operator\(matrix\)"):
        hf.dense(A.to_sparse())
