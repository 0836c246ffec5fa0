"""The state of a training in one file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from hessfunc.app.problems.nets import mlp
from hessfunc.training.checkpoint import TrainingCheckpoint, settings_of
from hessfunc.training.loop import Record, train
from hessfunc.training.methods import SGD
from tests.training.blobs import blobs


def test_a_state_of_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"

    def start(lr: float, epochs: int, count: int | None = None) -> list[Record]:
        model = mlp([2, 2])
        kept = TrainingCheckpoint(path, {"lr": lr})
        found = train(model, SGD(lr=lr).steps(model), blobs(), epochs=epochs, checkpoint=kept)
        return list(islice(found, count))

    start(0.1, 3, 2)
    with pytest.raises(
        ValueError, match=r"state.pt contains an unfinished .*lr was 0.1 and is now 0.2"
    ):
        start(0.2, 3)
    assert [r.step for r in start(0.1, 3)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"a finished .*lr was 0.1 and is now 0.2.: pass another"):
        start(0.2, 1)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"state.pt is damaged .*: remove it"):
        start(0.2, 1)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = TrainingCheckpoint(tmp_path / "state.pt", {"lr": 0.1, "epochs": (3, 4)})
    assert kept.read() is None
    kept.write({"state_dict": {"w": torch.ones(2)}, "step": 3}, finished=False)
    content = kept.read()
    assert content is not None
    assert (content["step"], content["finished"]) == (3, False)
    assert torch.equal(content["state_dict"]["w"], torch.ones(2))
    assert settings_of(kept.path) == {"lr": 0.1, "epochs": [3, 4]}


def test_a_file_of_plain_weights_has_no_settings(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    assert settings_of(tmp_path / "weights.pt") == {}
    assert settings_of(tmp_path / "none.pt") == {}
