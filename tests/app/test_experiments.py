from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import nn

from hessfunc.app import tasks
from hessfunc.app.experiments import EXPERIMENTS, Experiment, compared
from hessfunc.app.problems.nets import mlp
from hessfunc.training.history import Run, read, write
from hessfunc.training.loop import Record
from hessfunc.training.methods import CURVATURES, FACTORED, SGD, BlockNewton, blocks_of
from hessfunc.training.runs import run
from hessfunc.training.steps import Batch, Spent
from tests.datapath import data_file
from tests.training.blobs import blobs

SMALL = Experiment(
    title="A small one",
    dataset="digits",
    net="mlp",
    batch_size=50,
    epochs=1,
    methods={
        "SGD": SGD(lr=0.5),
        "GGN": BlockNewton(curvature="ggn", lr=0.5),
        "PCH": BlockNewton(curvature="pch-abs", lr=0.5),
    },
)


def record(**changed: float) -> Record:
    return replace(
        Record(
            step=1,
            epoch=0.5,
            loss=2.0,
            minibatch_loss=None,
            accuracy=0.25,
            test_loss=None,
            test_accuracy=None,
            matvecs=3,
            gradients=4.5,
            seconds=0.25,
            peak_bytes=2**20,
        ),
        **changed,
    )


def test_settings_are_those_of_the_literature() -> None:
    assert list(EXPERIMENTS) == ["exp01", "exp02", "exp08", "exp09"]
    for name, batch_size in (("exp01", 500), ("exp02", 500), ("exp08", 1000), ("exp09", 500)):
        assert EXPERIMENTS[name].batch_size == batch_size
        assert EXPERIMENTS[name].methods["SGD"] == SGD(lr=0.1, momentum=0.9)
    chen = {"lr": 0.1, "alpha": 0.02, "rtol": 0.1, "atol": 0.0, "max_matvecs": 50}
    for residual in ("zero", "abs", "clip"):
        method = EXPERIMENTS["exp01"].methods[f"HBP {residual}"]
        assert method == BlockNewton(curvature=f"hbp-{residual}", **chen)
    blocks = [m.max_blocks for m in list(EXPERIMENTS["exp02"].methods.values())[1:]]
    assert blocks == [1, 2, 4, 16]
    expected = {
        "exp08": {"zero": (0.1, 1e-4), "abs": (0.2, 1e-3), "clip": (0.1, 1e-4)},
        "exp09": {"zero": (0.05, 1e-3), "abs": (0.1, 1e-3), "clip": (0.1, 1e-2)},
    }
    for name, by_residual in expected.items():
        for residual, (lr, alpha) in by_residual.items():
            method = EXPERIMENTS[name].methods[f"PCH {residual}"]
            assert method == BlockNewton(
                curvature=f"pch-{residual}", lr=lr, alpha=alpha, max_matvecs=200
            )


def test_settings_are_plain_data() -> None:
    for experiment in EXPERIMENTS.values():
        settings = json.loads(json.dumps(experiment.settings()))
        assert settings["kinds"]["SGD"] == "SGD"
        assert list(settings["methods"]) == list(experiment.methods)
        tasks.net(experiment.dataset, experiment.net)


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


def test_compared_skips_what_is_finished() -> None:
    pytest.importorskip("sklearn")
    seen, held_out = tasks.examples("digits", count=100)
    started: list[tuple[str, int]] = []

    def watch(name: str, seed: int) -> object:
        started.append((name, seed))
        return lambda run: None

    finished = {("SGD", 0), ("PCH", 1)}
    runs = list(compared(SMALL, seen, held_out, seeds=2, finished=finished, watch=watch))
    assert started == [("GGN", 0), ("PCH", 0), ("SGD", 1), ("GGN", 1)]
    assert [(r.method, r.seed) for r in runs] == started
    assert {r.ended for r in runs} == {"complete"}
    # The same start for the same seed.
    assert runs[2].records[0].loss == runs[3].records[0].loss != runs[0].records[0].loss


def test_trainings_go_through_a_file(tmp_path: Path) -> None:
    path, settings = tmp_path / "results.json", {"epochs": 3, "blocks": (1, 2)}
    assert read(path, settings) == []
    runs = [Run(method="SGD", seed=1, ended="complete", records=(record(), record(step=2)))]
    write(path, settings, runs)
    assert read(path, settings) == runs
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="epochs was 3 and is now 4.: pass another --out"):
        read(path, {**settings, "epochs": 4})
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read(path, settings)


def test_tables() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from hessfunc.app.table import markdown, table

    runs = [
        Run(method="SGD", seed=0, ended="complete", records=(record(loss=9.0), record(loss=1.0))),
        Run(method="SGD", seed=1, ended="time is up", records=(record(loss=3.0),)),
        Run(method="PCH", seed=0, ended="complete", records=(record(test_accuracy=0.5),)),
    ]
    lines = markdown(runs).splitlines()
    assert len(lines) == 4
    assert "| SGD | 0, 1 | 2.0000 ± 1.4142 | 25.0% ± 0.0% |" in lines[2]
    assert lines[2].endswith("| 1.0 MiB | complete; time is up |")
    assert "| 50.0% |" in lines[3]
    text = StringIO()
    Console(width=80, file=text).print(table(runs))
    assert "PCH" in text.getvalue()
    assert "…" not in text.getvalue()


def test_a_summary_of_one_training() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from hessfunc.app.table import summary

    def lines(run: Run) -> list[str]:
        text = StringIO()
        Console(width=80, file=text).print(summary(run, batch_size=32))
        return [" ".join(line.split()) for line in text.getvalue().splitlines()]

    plain = Run(method="SGD", seed=0, ended="complete", records=(record(), record(loss=1.0)))
    found = lines(plain)
    assert "SGD" in found[1]
    assert "loss 1.0000" in found
    assert not any(line.startswith(("test loss", "dominant", "batch size")) for line in found)
    measured = record(epoch=4.0, eigenvalue=-2.5)
    grown = replace(plain, records=(record(), measured, record(epoch=5.0, ratio=4, lr=0.4)))
    assert {"dominant eigenvalue -2.5 (epoch 4)", "batch size 128", "learning rate 0.4"} <= set(
        lines(grown)
    )
    at_the_end = replace(plain, records=(record(), replace(measured, lr=0.1)))
    assert "dominant eigenvalue -2.5" in lines(at_the_end)


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hessfunc.plot.trainings import draw, trainings

    runs = [
        Run(method=method, seed=seed, ended="complete", records=(record(), record(gradients=9.0)))
        for method in ("SGD", "PCH")
        for seed in (0, 1)
    ]
    figure = trainings(runs)
    loss = figure.axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["SGD", "PCH"]
    # No test examples, no dashed lines.
    assert len(loss.lines) == 4
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    assert list(figure.axes[3].lines[0].get_xdata()) == [4.5, 9.0]
    draw(tmp_path / "curves.png", runs)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_each_curvature_has_blocks_of_each_parameter(curvature: str) -> None:
    model = mlp([2, 3, 2], nn.Sigmoid)
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = blocks_of(curvature, model)(params, (blobs().inputs, blobs().targets))
    assert list(blocks) == list(params)
    for name, p in params.items():
        block = blocks[name]
        assert getattr(block, "matvec", block)(p[None]).shape == (1, *p.shape)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "nothing"}, "choose one of hbp-none"),
        ({"curvature": "ggn", "max_blocks": 2}, "requires an hbp curvature"),
        ({"curvature": "hessian", "solve": "direct"}, "solve by cg"),
        ({"curvature": "ggn", "solve": "guess"}, "solve='guess'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockNewton(**options)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no network 'c4d3' for digits: choose mlp, convnet"):
        tasks.net("digits", "c4d3")
    with pytest.raises(ValueError, match="choose one of"):
        blocks_of("nothing", mlp([2, 2]))


def test_examples_of_both_data_sets() -> None:
    pytest.importorskip("sklearn")
    seen, held_out = tasks.examples("digits")
    assert (len(seen), len(held_out)) == (1500, 297)
    seen, held_out = tasks.examples("cifar10", path=data_file("cifar10"), count=20)
    assert (len(seen), len(held_out)) == (20, 20)
    assert seen.inputs.shape == (20, 3, 32, 32)
    assert asdict(seen).keys() == {"inputs", "targets"}
