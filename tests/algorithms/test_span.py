from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.span import Span
from hessfunc.spaces.of import space_of
from tests.reference.spectra import symmetric

N = 30
LIKE = {"a": torch.zeros(10).double(), "b": torch.zeros(N - 10).double()}
SPACE = space_of(LIKE)
MATRIX = symmetric(torch.linspace(-1, 4, N))


def pairs(k: int, rtol: float = 1e-9) -> hf.results.Eigenpairs:
    return hf.lanczos(hf.dense(MATRIX), LIKE, k=k, rtol=rtol, seed=0)


def test_without_eigenpairs() -> None:
    span, probes = Span.of(SPACE, None, "start"), torch.ones(2, N).double()
    assert len(span) == 0
    assert span.squares == 0.0
    assert not span.parts.any()
    assert not span.leaf_bounds(SPACE).any()
    assert span.complement(SPACE, probes, on_sphere=True) is probes


def test_parts_and_squares_are_those_of_the_matrix() -> None:
    top = pairs(3)
    span, vectors = Span.of(SPACE, top, "start"), SPACE.rows(top.vectors)
    deflated = (vectors.mT @ torch.diag(top.values) @ vectors).diagonal()
    assert span.parts.tolist() == pytest.approx(
        [float(deflated[:10].sum()), float(deflated[10:].sum())]
    )
    assert span.squares == pytest.approx(float((vectors @ MATRIX).square().sum()), rel=1e-9)


def test_bounds_of_leaves_contain_the_error_of_rough_eigenpairs() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.linalg.qr(torch.randn(N, 2, generator=generator).double()).Q.mT
        values, rotation = torch.linalg.eigh(rows @ MATRIX @ rows.mT)
        rows = rotation.mT @ rows
        residuals = (rows @ MATRIX - values[:, None] * rows).norm(dim=1)
        rough = hf.results.Eigenpairs(
            values=values,
            vectors=SPACE.vectors(rows),
            residuals=residuals,
            converged=residuals < 0,
            largest=4.0,
            matvecs=2,
            passes=1,
            reason="rough",
            seed=0,
        )
        span = Span.of(SPACE, rough, "start")
        P = torch.eye(N).double() - rows.mT @ rows
        deflated = (MATRIX - P @ MATRIX @ P).diagonal()
        exact = torch.stack([deflated[:10].sum(), deflated[10:].sum()])
        assert bool(((exact - span.parts).abs() <= span.leaf_bounds(SPACE) + 1e-12).all())


def test_complement_is_orthogonal_and_on_the_sphere() -> None:
    top = pairs(3)
    span, vectors = Span.of(SPACE, top, "start"), SPACE.rows(top.vectors)
    probes = SPACE.probes(range(4), kind="sphere", seed=0)
    outer = span.complement(SPACE, probes, on_sphere=True)
    assert float((outer @ vectors.mT).abs().max()) < 1e-12
    assert outer.square().sum(1).tolist() == pytest.approx([N - 3] * 4)


def test_the_whole_space_is_refused() -> None:
    small = torch.zeros(2).double()
    whole = hf.lanczos(hf.dense(torch.eye(2).double()), small, k=2, seed=0)
    with pytest.raises(ValueError, match=r"start has 2 eigenpairs .* start.values.sum\(\)"):
        Span.of(space_of(small), whole, "start")


@pytest.mark.parametrize("name", ["start", "deflate"])
def test_vectors_that_are_not_orthonormal_are_refused(name: str) -> None:
    top = pairs(3)
    twice = [0, 0, 1]
    joined = replace(
        top,
        values=top.values[twice],
        residuals=top.residuals[twice],
        vectors={key: leaf[twice] for key, leaf in top.vectors.items()},
    )
    estimator: Any = hf.trace if name == "start" else hf.hutchinson
    with pytest.raises(ValueError, match=f"vectors of {name} are not orthonormal.*off by 1"):
        estimator(lambda block: SPACE.unravel(SPACE.ravel(block) @ MATRIX), LIKE, **{name: joined})


def other(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Product with a matrix that has the same eigenvectors and 1.01 times the eigenvalues."""
    return SPACE.unravel(1.01 * (SPACE.ravel(block) @ MATRIX))


@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        (hf.trace, "start"),
        (hf.diagonal, "start"),
        (hf.hutchinson, "deflate"),
        (partial(hf.slq, steps=4), "deflate"),
    ],
)
def test_eigenpairs_of_another_matrix_are_refused(estimator: Any, name: str) -> None:
    given = {name: pairs(3), "seed": 0, "max_matvecs": 20}
    assert estimator(lambda block: SPACE.unravel(SPACE.ravel(block) @ MATRIX), LIKE, **given)
    with pytest.raises(ValueError, match=f"{name} belongs to another matrix"):
        estimator(other, LIKE, **given)
