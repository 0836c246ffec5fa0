"""Language models of Hugging Face in local folders, and texts on which their loss is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessfunc.app.plan import Transformer
from hessfunc.app.problems.targets import TargetError
from hessfunc.language_models import language_model_loss
from hessfunc.losses import Loss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Tokens of a sequence where the model allows them, and share of masked tokens (Devlin et al. 2019).
_TOKENS, _MASKED = 256, 0.15
# Bytes and at most as many special tokens; a larger vocabulary is that of a tokenizer.
_BYTES, _MOST_OF_BYTES = 256, 512
_IGNORED = -100
# Context of a model without a limit.
_UNLIMITED = 2**20


def language_model(
    folder: Path,
    text: Path,
    /,
    *,
    sequence: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    shard: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Loss, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the loss of a causal or masked language model, its parameters, and a text as a batch.

    The text is cut into sequences of the same length; the rest is left out. A causal model
    predicts each token from those before it. For a masked model, 15 % of the tokens of each
    sequence are replaced by the mask token, and are predicted from the others.

    Args:
        folder: Folder with a config, weights, and a tokenizer if there is one.
        text: Text file in UTF-8.
        sequence: Tokens per sequence; None for 256, or the context of the model if it is shorter.
        device: Device of the model; None for the CPU.
        dtype: Dtype of the parameters; None for float32.
        mesh: Mesh of ranks that divide the parameters; None to divide none.
        shard: Globs over the blocks of a divided model, as in `functional`.
        seed: Seed of the masked positions.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        TargetError: If the folder has no language model, if the text cannot be tokenized or is too
            short, or if the sequences are longer than the context of the model.
    """
    config = config_of(folder)
    _class_of(folder, config)
    length = _length(folder, config, sequence)
    written = _read(text)
    encoding = _encoding(folder, config, written)
    rows = _rows(text, encoding, length)
    model = _loaded(folder, config).to(device=device, dtype=dtype)
    is_masked = type(model).__name__.endswith("ForMaskedLM")
    batch = _masked(folder, rows, encoding, seed) if is_masked else {"labels": rows}
    loss, params = language_model_loss(model, mesh=mesh, shard=shard)
    return loss, params, [{"input_ids": rows, **batch}]


def config_of(folder: Path, /) -> Any:
    """Return the config of a local model.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        TargetError: If the folder has no config.
    """
    transformers = _transformers()
    if not folder.is_dir():
        raise TargetError(
            f"hf:{folder} must name a folder: download the model first, for instance with "
            f"`hf download NAME --local-dir {folder}`"
        )
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise TargetError(
                f"{folder} contains an adapter without its model: save the merged model, "
                "`model.merge_and_unload().save_pretrained(...)`, or pass module:function, which "
                "returns (*language_model_loss(peft_model), batches)"
            )
        raise TargetError(f"{folder} has no config.json: pass a folder of `save_pretrained`")
    with _silent():
        try:
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except (ValueError, OSError) as error:
            raise TargetError(f"{folder}: {error}") from error


@dataclass(frozen=True)
class Sizes:
    """Sizes of a language model.

    Attributes:
        shape: Layers, width, heads, vocabulary and parameters.
        largest: Number of entries of the largest parameter.
        context: Largest number of tokens of a sequence.
    """

    shape: Transformer
    largest: int
    context: int


def sizes(folder: Path, /) -> Sizes:
    """Return the sizes of a local model.

    The config is enough; weights are not read.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        TargetError: If the folder has no language model.
    """
    config = config_of(folder)
    with _silent(), torch.device("meta"):
        counts = [parameter.numel() for parameter in _class_of(folder, config)(config).parameters()]
    text = config.get_text_config()
    shape = Transformer(
        params=sum(counts),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        vocabulary=text.vocab_size,
    )
    return Sizes(shape, max(counts), _context(config))


def _class_of(folder: Path, config: Any) -> Any:
    """Return the class of a causal or masked language model."""
    transformers = _transformers()
    names = [*(config.architectures or ())]
    for name in names:
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
            return getattr(transformers, name)
    known = ", ".join(names) or "a model without an architecture"
    raise TargetError(
        f"{folder} has {known}: expected a causal or masked language model (...ForCausalLM, "
        "...LMHeadModel or ...ForMaskedLM); for other models, pass module:function"
    )


def _loaded(folder: Path, config: Any) -> Any:
    """Return the model in eval mode, with all of its weights from files."""
    kind = _class_of(folder, config)
    with _silent():
        try:
            model, report = kind.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise TargetError(f"the weights of {folder} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise TargetError(
            f"the weights of {folder} lack {missing[0]}, which {kind.__name__} would draw at random"
        )
    return model.eval()


def _context(config: Any) -> int:
    """Return the largest number of tokens of a sequence."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context or _UNLIMITED


def _length(folder: Path, config: Any, sequence: int | None) -> int:
    """Return the number of tokens of a sequence."""
    context = _context(config)
    if sequence is None:
        return min(_TOKENS, context)
    if sequence > context:
        raise TargetError(f"--sequence {sequence}: the context of {folder} has {context} tokens")
    return sequence


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise TargetError(f"--text {text} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TargetError(f"--text {text} is not a text in UTF-8: {error}") from error


@dataclass(frozen=True)
class _Encoding:
    """Text as tokens.

    Attributes:
        tokens: Tokens of the text.
        before: Special tokens before each sequence.
        after: Special tokens after each sequence.
        mask: Mask token; None if there is none.
    """

    tokens: Sequence[int]
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    mask: int | None = None


def _encoding(folder: Path, config: Any, written: str) -> _Encoding:
    """Return the tokens of a text: of the tokenizer, or bytes or characters without one."""
    size = config.get_text_config().vocab_size
    if (tokenizer := _tokenizer(folder)) is None:
        return _Encoding(_without_tokenizer(folder, size, written))
    plain = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(written, verbose=False)["input_ids"]
    # The text is one piece of the sequence with special tokens around it.
    ends = range(len(whole) - len(plain) + 1)
    start = next((i for i in ends if whole[i : i + len(plain)] == plain), None)
    if start is None:
        raise TargetError(f"the tokenizer of {folder} has special tokens inside of the text")
    if plain and max(whole) >= size:
        raise TargetError(
            f"the tokenizer of {folder} has a token {max(whole)}, but the model only {size}: copy "
            "the tokenizer with which the model was trained"
        )
    after = whole[start + len(plain) :]
    return _Encoding(plain, whole[:start], after, tokenizer.mask_token_id)


def _tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, or None if there is none."""
    transformers = _transformers()
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in (*files, "tokenizer_config.json")):
        return None
    with _silent():
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise TargetError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error


def _without_tokenizer(folder: Path, size: int, written: str) -> list[int]:
    data = written.encode()
    if size <= _MOST_OF_BYTES and data and max(data) < size:
        return list(data)
    characters = sorted(set(written))
    if len(characters) == size:
        numbers = {character: i for i, character in enumerate(characters)}
        return [numbers[character] for character in written]
    raise TargetError(
        f"{folder} has no tokenizer, and its {size} tokens are neither the {_BYTES} bytes nor the "
        f"{len(characters)} characters of the text: copy the files of its tokenizer into the folder"
    )


def _rows(text: Path, encoding: _Encoding, length: int) -> Tensor:
    """Return the sequences ``[N, T]``."""
    body = length - len(encoding.before) - len(encoding.after)
    tokens = torch.tensor(encoding.tokens, dtype=torch.long, device="cpu")
    body = min(body, len(tokens))
    if body < 2:
        raise TargetError(
            f"--text {text} has {len(tokens)} tokens, and --sequence {length} has room for {body}: "
            "at least 2 are needed"
        )
    rows = tokens[: len(tokens) // body * body].view(-1, body)
    ends = (tokens.new_tensor(ids) for ids in (encoding.before, encoding.after))
    before, after = (ids.expand(len(rows), -1) for ids in ends)
    return torch.cat([before, rows, after], 1)


def _masked(folder: Path, rows: Tensor, encoding: _Encoding, seed: int) -> dict[str, Tensor]:
    """Return sequences with masked tokens, the same number in each, and the labels of these."""
    if encoding.mask is None:
        raise TargetError(
            f"{folder} is a masked language model, and needs a tokenizer with a mask token"
        )
    first, last = len(encoding.before), rows.shape[1] - len(encoding.after)
    count = max(1, round(_MASKED * (last - first)))
    generator = torch.Generator().manual_seed(seed)
    shape = len(rows), last - first
    order = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    places = order.argsort(1)[:, :count] + first
    labels = torch.full_like(rows, _IGNORED).scatter(1, places, rows.gather(1, places))
    return {"input_ids": rows.scatter(1, places, encoding.mask), "labels": labels}


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a target hf:PATH requires transformers: pip install 'transformers>=4.50,<5'"
        ) from None
    return transformers


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
