"""The callback for the trainer of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hessfunc as hf
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
