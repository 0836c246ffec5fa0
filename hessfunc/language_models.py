"""Losses of the language models of Hugging Face, without whole logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice
from hessfunc.copies import structural_copy
from hessfunc.linear_head import LinearHeadLoss, linear_head_loss
from hessfunc.modules import functional
from hessfunc.options import validated
from hessfunc.trees import Tree


@validated
def language_model_loss(
    model: nn.Module,
    /,
    *,
    shift: bool | None = None,
    trainable_only: bool = True,
    dtype: torch.dtype | None = None,
    recompute: str | None = None,
    rows_per_chunk: int | None = None,
) -> tuple[LinearHeadLoss, dict[str, Tensor]]:
    """Return the loss of a language model of Hugging Face without whole logits, and its parameters.

        loss = mean over tokens whose label is not -100 of -log p(label | context)

    It equals the loss that the model computes itself from ``labels``, without auxiliary losses of
    mixtures of experts. A batch is a mapping with
    ``labels`` and the arguments of the model, such as ``input_ids`` and ``attention_mask``.

        loss, params = hf.language_model_loss(model)
        matvec = hf.hvp(loss)(params, {"input_ids": ids, "labels": ids})

    The model is evaluated up to its output embedding, and the logits of a few tokens at a time are
    computed as `linear_head_loss` describes. Scaled and soft-capped logits are recognised. When
    this function is called, the logits of a short text are compared with those of the model.

    Args:
        model: Model with a linear output embedding, tied or not, such as ``GPT2LMHeadModel``,
            ``LlamaForCausalLM`` or ``BertForMaskedLM``.
        shift: Whether the output at token t predicts the label of token t + 1, as in causal models.
            None decides by the name of the model's class.
        trainable_only: Whether to leave parameters that do not require a gradient out of params,
            as in `functional`.
        dtype: Dtype in which the model is evaluated up to the head, as in `functional`.
        recompute: Glob over the names of modules to recompute, as in `functional`.
        rows_per_chunk: Number of tokens whose logits exist at once; None for at most 2^22 logits.

    Raises:
        TypeError: If the model has no linear output embedding.
        ValueError: If the logits are not those of a linear layer, or if ``shift`` is None and the
            class is neither a causal nor a masked language model; raised by the loss, if a batch
            has no ``labels``.

    Cost: one evaluation of the model on four tokens.
    """
    head = _head_of(model)
    options = _options(model)
    shifted = _is_causal(model) if shift is None else shift
    trunk = _without_head(model, head)
    trunk_fn, params = functional(
        trunk, trainable_only=trainable_only, dtype=dtype, recompute=recompute
    )

    def states(params: Tree, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden, weight, bias = trunk_fn(params, _inputs(batch))
        return (hidden[:, :-1] if shifted else hidden), weight, bias

    def targets(batch: Any) -> Tensor:
        labels: Tensor = _with_labels(batch)["labels"]
        return labels[:, 1:] if shifted else labels

    loss = linear_head_loss(states, targets, rows_per_chunk=rows_per_chunk, **options)
    _refuse_other_logits(model, loss, dtype)
    return loss, params


class _Reached(Exception):  # noqa: N818
    """End of an evaluation at the head.

    Attributes:
        states: Hidden states, and the weight and the bias of the head.
    """

    def __init__(self, *states: Tensor | None) -> None:
        super().__init__()
        self.states = states


class _Head(nn.Module):
    """Head at which an evaluation of the model ends."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        raise _Reached(hidden, self.weight, self.bias)


class _Trunk:
    """Forward of a model up to its head, as the first base of the model's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            super().forward(*args, **kwargs)  # type: ignore[misc]
        except _Reached as reached:
            return reached.states
        raise ValueError("the model returned without a call of its output embedding")


def _without_head(model: nn.Module, head: nn.Linear) -> nn.Module:
    """Return a structural copy of a model whose forward returns the input of its head."""
    trunk = structural_copy(model)
    if trunk is None:
        raise TypeError(
            f"{type(model).__name__} cannot be copied without its tensors, or its hooks refer to "
            "its own modules: use `linear_head_loss`, with a function that returns hidden states"
        )
    copied = _head_of(trunk)
    for module in list(trunk.modules()):
        for name, child in module.named_children():
            if child is copied:
                setattr(module, name, _Head(copied))
    kind = type(trunk)
    config: Any = getattr(trunk, "config", None)
    if hasattr(config, "use_cache"):
        # A cache of keys and values is not part of the loss.
        config.use_cache = False
    trunk.__class__ = type(kind.__name__, (_Trunk, kind), {"__module__": kind.__module__})
    return trunk


def _head_of(model: nn.Module) -> nn.Linear:
    """Return the output embedding of a model.

    Raises:
        TypeError: If it is not a linear layer.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if type(head) is not nn.Linear:
        has = "no output embedding" if head is None else f"a {type(head).__name__} as its head"
        raise TypeError(
            f"{type(model).__name__} has {has}, not a linear layer: use `linear_head_loss` with a "
            "function that returns hidden states and a weight, or `composed` with whole logits"
        )
    return head


def _options(model: nn.Module) -> dict[str, Any]:
    """Return the scale and the bound of the logits from the config of a model."""
    config = getattr(model, "config", None)
    # Cohere multiplies logits, Granite divides them, Gemma 2 bounds them.
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def _is_causal(model: nn.Module) -> bool:
    """Return whether labels are shifted, by the name of the class of a model."""
    names = [kind.__name__ for kind in type(model).__mro__]
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    if any(name.endswith(("ForMaskedLM", "ForConditionalGeneration")) for name in names):
        return False
    raise ValueError(
        f"{type(model).__name__} is not named like a causal or a masked language model: pass "
        "shift=True if the output at a token predicts the next one, or shift=False"
    )


def _refuse_other_logits(model: nn.Module, loss: LinearHeadLoss, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless the logits of the loss are those of the model on a short text."""
    head = _head_of(model)
    ids = torch.arange(4, device=head.weight.device)[None] % len(head.weight)
    inputs = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    model_fn, params = functional(model, trainable_only=False)
    with torch.no_grad(), differentiable_twice(head.weight.device):
        outputs = model_fn(params, inputs)
        logits = (outputs.logits if hasattr(outputs, "logits") else outputs[0])[0]
    # Random layers draw the same masks again.
    with torch.no_grad(), differentiable_twice(head.weight.device):
        rows = loss.outputs(params, inputs | {"labels": ids})[0].T.to(logits.dtype)
    # A causal loss drops the last token.
    logits = logits[: len(rows)]
    tolerance = torch.finfo(dtype or logits.dtype).eps ** 0.5
    if not torch.allclose(logits, rows, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its output embedding, but "
            f"differ by up to {float((logits - rows).abs().max()):.2g}: use `composed` with the "
            "model's own logits"
        )


def _with_labels(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping) or "labels" not in batch:
        given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"the batch is {given}, but a language model needs a mapping with 'labels': pass for "
            "instance {'input_ids': ids, 'labels': ids}, with -100 where a token does not count"
        )
    return batch


def _inputs(batch: Any) -> dict[str, Any]:
    """Return the arguments of the model."""
    return {name: value for name, value in _with_labels(batch).items() if name != "labels"}
