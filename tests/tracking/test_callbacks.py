from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.tracking import read


@pytest.fixture
def gpt2() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(11, (3, 6))
    return {"input_ids": ids, "labels": ids}


def huggingface_training(model: nn.Module, callback: Any, *, epochs: int, steps: int) -> None:
    """The hooks in the order in which the Trainer calls them."""
    state = SimpleNamespace(global_step=0, epoch=0.0, is_world_process_zero=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    # As accelerate wraps it.
    rest = (SimpleNamespace(), state, SimpleNamespace())
    kwargs = {"model": model, "optimizer": SimpleNamespace(optimizer=optimizer)}
    model.train()
    callback.on_train_begin(*rest, **kwargs)
    for _ in range(epochs):
        for _ in range(steps):
            optimizer.zero_grad()
            model(**tokens()).loss.backward()
            optimizer.step()
            state.global_step += 1
            state.epoch = state.global_step / steps
            callback.on_step_end(*rest, **kwargs)
        callback.on_epoch_end(*rest, **kwargs)
    callback.on_train_end(*rest, **kwargs)


def test_the_trainer_of_hugging_face(gpt2: Any, tmp_path: Path) -> None:
    from hessfunc.tracking.huggingface import CurvatureCallback

    batch = tokens()
    callback = CurvatureCallback(
        [batch], every=2, out=tmp_path / "points.jsonl", preconditioned=True, rtol=1e-3
    )
    huggingface_training(gpt2, callback, epochs=2, steps=2)
    assert [(p.step, p.epoch) for p in callback.points] == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert [p.preconditioned is None for p in callback.points] == [True, False, False]
    assert callback.points[0].lr == 0.01
    assert read(tmp_path / "points.jsonl") == callback.points
    model_fn, params = hf.functional(gpt2.eval())
    matvec = hf.hvp(lambda params, batch: model_fn(params, batch).loss)(params, batch)
    expected = hf.lanczos(matvec, params, k=1, which="LA", seed=0)
    assert callback.points[-1].top[0] == pytest.approx(float(expected.values[0]), rel=1e-3)


def test_epochs_of_hugging_face(gpt2: Any) -> None:
    from hessfunc.tracking.huggingface import CurvatureCallback

    callback = CurvatureCallback([tokens()], every=2, unit="epochs", rtol=0.1)
    huggingface_training(gpt2, callback, epochs=3, steps=3)
    assert [p.step for p in callback.points] == [0, 6]


def test_other_processes_of_hugging_face_do_not_measure(gpt2: Any) -> None:
    from hessfunc.tracking.huggingface import CurvatureCallback

    callback = CurvatureCallback([tokens()])
    state = SimpleNamespace(global_step=0, epoch=0.0, is_world_process_zero=False)
    rest = (SimpleNamespace(), state, SimpleNamespace())
    callback.on_train_begin(*rest, model=gpt2)
    callback.on_step_end(*rest)
    callback.on_train_end(*rest)
    assert callback.points == []


def test_a_trainer_of_hugging_face(gpt2: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    import transformers

    from hessfunc.tracking.huggingface import CurvatureCallback

    data = [{name: tensor[0] for name, tensor in tokens().items()} for _ in range(8)]
    callback = CurvatureCallback([tokens()], every=2, rtol=0.1)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to=[], save_strategy="no", use_cpu=True
    )
    transformers.Trainer(gpt2, arguments, train_dataset=data, callbacks=[callback]).train()
    assert [p.step for p in callback.points] == [0, 2, 4]


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
