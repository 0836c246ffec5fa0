"""One training, from its settings to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from hessfunc.app.problems.nets import mlp
from hessfunc.training.history import Run
from hessfunc.training.methods import FACTORED, SGD, BlockNewton
from hessfunc.training.runs import run
from hessfunc.training.steps import Batch, Spent
from tests.training.blobs import blobs


def test_methods_start_from_the_same_weights_and_see_the_same_batches() -> None:
    seen: list[torch.Tensor] = []

    class Spy:
        def steps(self, model: nn.Module, /, *, seed: int = 0) -> object:
            seen.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
            steps = SGD().steps(model)

            def move(batches: Sequence[Batch]) -> Spent:
                seen.append(batches[0][0])
                return steps.move(batches)

            return replace(steps, move=move)

    state = torch.get_rng_state()
    for seed in (3, 3, 4):
        run("spy", lambda: mlp([2, 3, 2]), Spy(), blobs(), epochs=1, batch_size=60, seed=seed)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[1], seen[5])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_says_how_it_ended() -> None:
    def ended(method: SGD, minutes: float | None = None) -> Run:
        return run(
            "SGD", lambda: mlp([2, 3, 2]), method, blobs(), epochs=4, batch_size=60, minutes=minutes
        )

    assert ended(SGD()).ended == "complete"
    assert ended(SGD(), 0).ended == "time is up"
    diverged = ended(SGD(lr=1e38))
    assert "lower the learning rate" in diverged.ended
    assert diverged.records[0].step == 0


def test_the_callback_sees_the_running_training() -> None:
    seen: list[Run] = []
    found = run(
        "SGD", lambda: mlp([2, 3, 2]), SGD(), blobs(), epochs=2, batch_size=30, callback=seen.append
    )
    assert [len(r.records) for r in seen] == [1, 2, 3]
    assert {r.ended for r in seen} == {"running"}
    assert found == replace(seen[-1], ended="complete")


# The matrix of hbp-none may be indefinite.
SOLVED = [(c, s) for c in FACTORED for s in ("cg", "direct") if (c, s) != ("hbp-none", "direct")]


@pytest.mark.parametrize(("curvature", "solve"), SOLVED)
def test_factored_curvatures_train(curvature: str, solve: str) -> None:
    method = BlockNewton(curvature=curvature, lr=0.3, alpha=0.1, solve=solve)
    found = run(
        curvature, lambda: mlp([2, 6, 2], nn.Sigmoid), method, blobs(), epochs=4, batch_size=30
    )
    assert found.ended == "complete"
    assert found.records[-1].loss < 0.8 * found.records[0].loss
