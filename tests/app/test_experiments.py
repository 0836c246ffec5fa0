from __future__ import annotations

import json

import pytest

from hessfunc.app import tasks
from hessfunc.app.experiments import EXPERIMENTS, Experiment, compared
from hessfunc.training.methods import SGD, BlockNewton

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


def test_compared_skips_what_is_finished() -> None:
    pytest.importorskip("sklearn")
    seen, held_out = tasks.examples("digits", count=100)
    started: list[tuple[str, int]] = []

    def on_run(name: str, seed: int) -> object:
        started.append((name, seed))
        return lambda run: None

    finished = {("SGD", 0), ("PCH", 1)}
    runs = list(compared(SMALL, seen, held_out, seeds=2, finished=finished, on_run=on_run))
    assert started == [("GGN", 0), ("PCH", 0), ("SGD", 1), ("GGN", 1)]
    assert [(r.method, r.seed) for r in runs] == started
    assert {r.ended for r in runs} == {"complete"}
    # The same start for the same seed.
    assert runs[2].records[0].loss == runs[3].records[0].loss != runs[0].records[0].loss
