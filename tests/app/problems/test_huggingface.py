"""Language models in local folders, small and random, and the texts on which they are evaluated."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hessfunc as hf
from hessfunc.app.problems.huggingface import config_of, language_model, sizes
from hessfunc.app.problems.targets import TargetError
from tests.app.problems.language_models import TEXT, WORDS, bert, gpt2, saved, with_words


def test_a_causal_model_on_bytes(tmp_path: Path) -> None:
    model = gpt2().eval()
    folder = saved(tmp_path, model)
    loss, params, (batch,) = language_model(folder, tmp_path / "text.txt", sequence=10)
    assert sum(leaf.numel() for leaf in params.values()) == sum(
        p.numel() for p in model.parameters()
    )
    assert batch["input_ids"].shape == (len(TEXT) // 10, 10)
    assert bytes(batch["input_ids"].flatten().tolist()) == TEXT[:90].encode()
    with torch.no_grad():
        assert torch.isclose(loss(params, batch), model(**batch).loss, rtol=1e-5)
    matvec = hf.over_batches(hf.hvp(loss))(params, hf.microbatches(batch, 4))
    assert hf.check(matvec, params)


def test_a_masked_model_with_its_tokenizer(tmp_path: Path) -> None:
    folder = with_words(saved(tmp_path, bert()))
    loss, params, (batch,) = language_model(folder, tmp_path / "text.txt", sequence=14, seed=1)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == (4, 14)
    assert ids[:, 0].eq(WORDS.index("[CLS]")).all()
    assert ids[:, -1].eq(WORDS.index("[SEP]")).all()
    hidden = labels != -100
    assert hidden.sum(1).tolist() == 4 * [2]
    assert ids[hidden].eq(WORDS.index("[MASK]")).all()
    tokens = torch.where(hidden, labels, ids)[:, 1:-1].flatten().tolist()
    assert [WORDS[token] for token in tokens] == TEXT.split()
    assert loss(params, batch).isfinite()
    again = language_model(folder, tmp_path / "text.txt", sequence=14, seed=1)[2][0]
    assert again["labels"].equal(labels)


def test_characters_where_they_are_the_vocabulary(tmp_path: Path) -> None:
    text = "häßlich" * 3
    folder = saved(tmp_path, gpt2(len(set(text))))
    (tmp_path / "text.txt").write_text(text)
    batch = language_model(folder, tmp_path / "text.txt", sequence=7)[2][0]
    assert batch["input_ids"].tolist() == 3 * [[sorted(set(text)).index(c) for c in "häßlich"]]


def test_dtype_and_the_default_length(tmp_path: Path) -> None:
    folder = saved(tmp_path, gpt2())
    file = tmp_path / "text.txt"
    _, params, (batch,) = language_model(folder, file, dtype=torch.float64)
    assert {leaf.dtype for leaf in params.values()} == {torch.float64}
    # The context of the model is 16 tokens.
    assert batch["input_ids"].shape[1] == 16
    file.write_text("abcde")
    assert language_model(folder, file)[2][0]["input_ids"].shape == (1, 5)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("model", "change", "text", "message"),
    [
        (gpt2, remove("config.json"), TEXT, "has no config.json"),
        (gpt2, remove("model.safetensors"), TEXT, "the weights of .* cannot be loaded"),
        (lambda: gpt2(700), lambda _: None, TEXT, "no tokenizer, and its 700 tokens are neither"),
        (lambda: gpt2(99), lambda _: None, TEXT, "99 tokens are neither the 256 bytes nor the 6"),
        (gpt2, lambda _: None, "a", "has 1 tokens, and --sequence 16 has room for 1: at least 2"),
        (gpt2, lambda f: (f.parent / "text.txt").unlink(), TEXT, "cannot be read: No such file"),
        (gpt2, lambda f: (f.parent / "text.txt").write_bytes(b"\xff"), TEXT, "not a text in UTF"),
        (bert, lambda _: None, "\1\2\3\4", "needs a tokenizer with a mask token"),
        (lambda: bert().bert, lambda _: None, TEXT, "has BertModel: expected a causal or masked"),
        (bert, with_words, "", "has 0 tokens, and --sequence 16 has room for 0"),
        (lambda: gpt2(9), with_words, TEXT + "e", "has a token 9, but the model only 9"),
    ],
)
def test_mistakes_say_what_to_do(
    tmp_path: Path, model: Any, change: Callable[[Path], object], text: str, message: str
) -> None:
    folder = saved(tmp_path, model())
    (tmp_path / "text.txt").write_text(text)
    change(folder)
    with pytest.raises(TargetError, match=message):
        language_model(folder, tmp_path / "text.txt")


def test_longer_sequences_than_the_context_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, gpt2())
    with pytest.raises(TargetError, match="--sequence 17: the context of .* has 16 tokens"):
        language_model(folder, tmp_path / "text.txt", sequence=17)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="must name a folder: download the model first"):
        config_of(tmp_path / "gpt2")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TargetError, match=r"merge_and_unload"):
        config_of(tmp_path)


def test_transformers_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'transformers>=4.50,<5'"):
        config_of(tmp_path)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_sizes_are_those_of_the_model_without_its_weights(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    model = make()
    folder = saved(tmp_path, model)
    (folder / "model.safetensors").unlink()
    read, counts = sizes(folder), [p.numel() for p in model.parameters()]
    assert (read.shape.params, read.largest, read.context) == (sum(counts), max(counts), 16)
    assert (read.shape.layers, read.shape.width, read.shape.heads) == (1, 8, 2)
    assert read.shape.vocabulary == model.config.vocab_size
