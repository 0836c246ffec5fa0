from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.app.problems.nets import mlp


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapter over a stand-in for Lightning's base class."""
    stand_in = ModuleType("lightning.pytorch")
    stand_in.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", stand_in)
    monkeypatch.delitem(sys.modules, "hessfunc.tracking.lightning", raising=False)
    yield importlib.import_module("hessfunc.tracking.lightning")
    sys.modules.pop("hessfunc.tracking.lightning")


def lightning_training(callback: Any, *, epochs: int, steps: int, accumulated: int = 1) -> None:
    """The hooks in the order in which the Trainer calls them."""
    model = mlp([4, 5, 3], nn.Tanh).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = SimpleNamespace(
        global_step=0, current_epoch=0, is_global_zero=True, optimizers=[optimizer]
    )
    callback.on_train_start(trainer, model)
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        for i in range(steps * accumulated):
            inputs, targets = torch.randn(5, 4), torch.randint(3, (5,))
            F.cross_entropy(model(inputs), targets).backward()
            if (i + 1) % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()
                trainer.global_step += 1
            callback.on_train_batch_end(trainer, model, None, (inputs, targets), i)
        callback.on_train_epoch_end(trainer, model)
    callback.on_train_end(trainer, model)


def held() -> list[Any]:
    return [(torch.randn(9, 4), torch.randint(3, (9,)))]


def test_the_trainer_of_lightning(lightning: Any) -> None:
    callback = lightning.CurvatureCallback(F.cross_entropy, held(), every=2)
    assert isinstance(callback, sys.modules["lightning.pytorch"].Callback)
    lightning_training(callback, epochs=2, steps=3, accumulated=2)
    assert [(p.step, p.epoch, p.lr) for p in callback.points] == [
        (0, 0, 0.1),
        (2, 0, 0.1),
        (4, 1, 0.1),
        (6, 1, 0.1),
    ]
    assert all(len(p.top) == 1 for p in callback.points)


def test_epochs_of_lightning(lightning: Any) -> None:
    callback = lightning.CurvatureCallback(F.cross_entropy, held(), every=2, unit="epochs")
    lightning_training(callback, epochs=4, steps=3)
    assert [(p.step, p.epoch) for p in callback.points] == [(0, 0), (6, 2), (12, 4)]


@pytest.fixture
def real_lightning() -> Iterator[Any]:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            library = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        sys.modules.pop("hessfunc.tracking.lightning", None)
        yield library
        sys.modules.pop("hessfunc.tracking.lightning", None)
        return
    pytest.skip("Lightning is not installed")


def lightning_fit(library: Any, callbacks: list[Any]) -> dict[str, torch.Tensor]:
    """The parameters after a training of six steps, of two batches each, in two epochs."""

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(mlp([4, 5, 3], nn.Tanh), nn.Dropout(0.2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(1)
    data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    module = Module()
    library.Trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    ).fit(module, DataLoader(data, 4, shuffle=True))
    return module.state_dict()


# Lightning's own use of torch, and its advice.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("steps", [(0, 0, 0.1), (2, 0, 0.1), (4, 1, 0.1), (6, 1, 0.1)]),
        ("epochs", [(0, 0, 0.1), (6, 2, 0.1)]),
    ],
)
def test_a_trainer_of_lightning(real_lightning: Any, unit: Any, expected: list[Any]) -> None:
    from hessfunc.tracking.lightning import CurvatureCallback

    callback = CurvatureCallback(F.cross_entropy, held(), every=2, unit=unit)
    watched = lightning_fit(real_lightning, [callback])
    assert [(p.step, p.epoch, p.lr) for p in callback.points] == expected
    plain = lightning_fit(real_lightning, [])
    assert all(torch.equal(leaf, plain[name]) for name, leaf in watched.items())


@pytest.mark.parametrize(
    ("adapter", "absent"),
    [
        ("huggingface", ["transformers"]),
        ("lightning", ["lightning.pytorch", "pytorch_lightning"]),
    ],
)
def test_a_library_that_is_absent_is_named(
    adapter: str, absent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"hessfunc.tracking.{adapter}", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        importlib.import_module(f"hessfunc.tracking.{adapter}")
