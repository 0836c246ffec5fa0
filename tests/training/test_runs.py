"""One training, from its settings to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessfunc.app.problems.nets import mlp
from hessfunc.optim.schedules import absa
from hessfunc.training.checkpoint import TrainingCheckpoint
from hessfunc.training.history import Run
from hessfunc.training.methods import FACTORED, SGD, BlockNewton, Method
from hessfunc.training.runs import run
from hessfunc.training.steps import Batch, Spent
from tests.training.blobs import blobs
from tests.training.problem import small_net


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


def options(method: Method, path: Path | None) -> dict[str, Any]:
    kept = None if path is None else TrainingCheckpoint(path, {"seed": 5}, every=2)
    return {
        "epochs": 5,
        "batch_size": 7,
        "seed": 5,
        "schedule": absa(epochs=5, max_ratio=4, patience=2, lr_decay_epochs=(3,)),
        "track": "top",
        "checkpoint": kept,
    }


class Killed(BaseException):
    """Stands for a signal."""


METHODS = {
    "sgd": SGD(lr=0.05),
    "newton": BlockNewton(curvature="hbp-abs", lr=0.1, alpha=0.5, max_matvecs=4),
}


@dataclass(frozen=True)
class Whole:
    """A training that nothing has interrupted."""

    method: Method
    make: Callable[[], nn.Module]
    training: Run
    state: dict[str, Tensor]


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    method = METHODS[request.param]
    make = small_net if request.param == "sgd" else lambda: mlp([2, 5, 2], nn.Sigmoid)
    path = tmp_path_factory.mktemp("whole") / "state.pt"
    training = run("it", make, method, blobs(), blobs(20), **options(method, path))
    return Whole(method, make, training, torch.load(path, weights_only=True)["state_dict"])


# Nine steps make the first epoch; what is killed at the ninth goes on at a smaller batch.
@pytest.mark.parametrize("killed_at", [1, 9, 10, 15, 22])
def test_a_killed_training_ends_with_the_same_bits(
    whole: Whole, killed_at: int, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    given = "it", whole.make, whole.method, blobs(), blobs(20)
    steps = [0]

    def kill(examples: int) -> None:
        steps[0] += 1
        if steps[0] == killed_at:
            raise Killed

    with pytest.raises(Killed):
        run(*given, on_step=kill, **options(whole.method, path))
    torch.rand(17)
    found = run(*given, **options(whole.method, path))
    timeless = [[replace(r, seconds=0.0) for r in one.records] for one in (found, whole.training)]
    assert timeless[0] == timeless[1]
    assert found.ended == "complete"
    resumed = torch.load(path, weights_only=True)["state_dict"]
    assert whole.state.keys() == resumed.keys()
    for key, leaf in whole.state.items():
        assert torch.equal(leaf, resumed[key]), key
    assert {file.name for file in tmp_path.iterdir()} == {"state.pt"}


def test_a_finished_training_is_told_again_without_a_step(tmp_path: Path) -> None:
    method = METHODS["sgd"]
    first = run("it", small_net, method, blobs(), **options(method, tmp_path / "state.pt"))
    steps: list[int] = []
    again = run(
        "it",
        small_net,
        method,
        blobs(),
        on_step=steps.append,
        **options(method, tmp_path / "state.pt"),
    )
    assert again == first
    assert steps == []


def test_time_that_is_up_is_so_after_going_on_too(tmp_path: Path) -> None:
    kept = TrainingCheckpoint(tmp_path / "state.pt", {})
    for minutes, ended, steps in ((0, "time is up", 1), (0, "time is up", 1), (9, "complete", 4)):
        found = run(
            "it",
            small_net,
            SGD(),
            blobs(),
            epochs=2,
            batch_size=30,
            minutes=minutes,
            checkpoint=kept,
        )
        assert (found.ended, found.records[-1].step) == (ended, steps)


def test_records_are_plain(tmp_path: Path) -> None:
    found = run("it", small_net, SGD(), blobs(), epochs=1, batch_size=30)
    assert asdict(found.records[-1])["ratio"] == 1
