"""Systems with gradients as right-hand sides."""

from __future__ import annotations

import pytest

import hessfunc as hf
from tests.distributed import problems
from tests.distributed.ranks import Ranks
from tests.recipes.influence.problem import DAMPING, LOSS, MODEL, PARAMS, QUERIES, TRAIN


def test_negative_curvature_is_an_error_with_the_damping_that_helps() -> None:
    negative = hf.matvecs.scale(lambda block: block, -1.0)
    with pytest.raises(ValueError, match=r"not positive definite.*raise the damping above"):
        hf.influence(LOSS, PARAMS, TRAIN, QUERIES, damping=0.5, curvature=negative)
    with pytest.raises(ValueError, match="rtol=0"):
        hf.influence(LOSS, PARAMS, TRAIN, QUERIES, damping=0.5, rtol=0.0)


def test_structured_blocks_need_no_preconditioner() -> None:
    with pytest.raises(ValueError, match="omit `preconditioner`"):
        hf.influence(
            LOSS,
            PARAMS,
            TRAIN,
            QUERIES,
            damping=DAMPING,
            curvature=hf.kronecker.ekfac(LOSS, MODEL),
            preconditioner=lambda block: block,
        )


def test_products_and_passes_of_all_query_batches_are_counted() -> None:
    calls = []

    def matvec(block: object) -> object:
        calls.append(len(next(iter(block.values()))))  # type: ignore[attr-defined]
        return block

    found = hf.influence(LOSS, PARAMS, TRAIN, QUERIES, damping=1.0, curvature=matvec)
    assert found.matvecs == sum(calls)
    assert found.passes == len(calls)


def differs_on_a_mesh(name: str) -> float:
    loss, params = problems.model_and_loss()
    batches, curvature = problems.batches(), problems.curvature(name)
    matvec = hf.over_batches(curvature, mesh=problems.mesh(2, names=("data",)))(params, batches)
    one, two = (
        hf.influence(
            loss, params, batches, batches[:2], damping=DAMPING, rtol=1e-11, curvature=given
        )
        for given in (curvature, matvec)
    )
    return float((one.scores - two.scores).abs().max())


@pytest.mark.parametrize("name", ["ggnvp", "ekfac"])
def test_the_matrix_may_be_divided_among_ranks(name: str, two: Ranks) -> None:
    assert max(two.run(differs_on_a_mesh, name)) < 1e-8
