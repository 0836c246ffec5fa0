"""Losses of the language models of Hugging Face, without whole logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.recomputed_blocks import segments_of
from hessfunc.copies import structural_copy
from hessfunc.linear_head import LinearHeadLoss, linear_head_loss
from hessfunc.modules import functional
from hessfunc.options import validated
from hessfunc.trees import Tree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hessfunc.sharding.parts import Choice


@validated
def language_model_loss(
    model: nn.Module,
    /,
    *,
    shift: bool | None = None,
    trainable_only: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    recompute: str | None = None,
    mesh: DeviceMesh | None = None,
    shard: Choice | None = None,
    rows_per_chunk: int | None = None,
) -> tuple[LinearHeadLoss, dict[str, Tensor]]:
    """Return the loss of a language model of Hugging Face without whole logits, and its parameters.

        loss = mean over tokens whose label is not -100 of -log p(label | context)

    It equals the loss that the model computes itself from ``labels``, without auxiliary losses of
    mixtures of experts. A batch is a mapping with ``labels`` and the arguments of the model, such
    as ``input_ids`` and ``attention_mask``.

        loss, params = hf.language_model_loss(model)
        matvec = hf.hvp(loss)(params, {"input_ids": ids, "labels": ids})

    The model is evaluated up to its output embedding, and the logits of a few tokens at a time are
    computed as `linear_head_loss` describes. Scaled and soft-capped logits are recognised. When
    this function is called, the logits and the loss of a short text are compared with those of the
    model. Kronecker factors need whole logits, see `composed`.

    Args:
        model: Model with a linear output embedding, tied or not, such as ``GPT2LMHeadModel``,
            ``LlamaForCausalLM`` or ``BertForMaskedLM``.
        shift: Whether the output at token t predicts the label of token t + 1, as in causal models.
            None decides by the loss of the model itself.
        trainable_only: Whether to leave parameters that do not require a gradient out of params,
            as in `functional`.
        dtype: Dtype in which the model is evaluated up to the head, as in `functional`.
        device: Device on which the model is evaluated, as in `functional`.
        recompute: Glob over the names of modules to recompute, as in `functional`.
        mesh: Mesh of ranks that divide the parameters and the rows of a batch, as in `functional`.
            The head is outside of the blocks, and replicated while a graph is kept.
        shard: Blocks of a model on a mesh, as in `functional`.
        rows_per_chunk: Number of tokens whose logits exist at once; None for at most 2^22 logits.

    Raises:
        TypeError: If the model has no linear output embedding, or one with hooks.
        ValueError: If the logits or the loss are not those of a linear layer; raised by the loss,
            if a batch has no ``labels``, or no ``decoder_input_ids`` for a model with a decoder.
        RuntimeError: If a tensor of the model has been replaced; raised by the loss.

    Cost: six evaluations of the model on eight tokens.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise NotImplementedError(
            f"the parameters of {type(model).__name__} are DTensors: pass the plain model on each "
            "rank, and `mesh=mesh`"
        )
    shifted = _verified_shift(model, shift, device)
    trunk = _without_head(model)
    if recompute is not None:
        _refuse_head_in(trunk, segments_of(trunk, recompute), f"recompute={recompute!r}")
    trunk_fn, params = functional(
        trunk,
        trainable_only=trainable_only,
        dtype=dtype,
        device=device,
        recompute=recompute,
        mesh=mesh,
        shard=shard,
    )
    if mesh is not None:
        parts = trunk_fn.parts  # type: ignore[attr-defined]
        _refuse_head_in(trunk, parts.blocks, f"shard={shard!r}")
        # Each rank has its shards, so that the whole model can be freed.
        model = parts.skeleton
    return _loss_of(model, trunk_fn, shifted=shifted, rows_per_chunk=rows_per_chunk), params


def _loss_of(
    model: nn.Module,
    trunk_fn: Callable[[Tree, Any], Any],
    *,
    shifted: bool,
    rows_per_chunk: int | None = None,
) -> LinearHeadLoss:
    """Return the loss of a model whose hidden states and head ``trunk_fn`` returns."""
    refuse_if_replaced = _unreplaced(model)

    def states(params: Tree, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        refuse_if_replaced()
        hidden, weight, bias = trunk_fn(params, _inputs(model, batch))
        return (hidden[:, :-1] if shifted else hidden), weight, bias

    def targets(batch: Any) -> Tensor:
        labels: Tensor = _with_labels(batch)["labels"]
        return labels[:, 1:] if shifted else labels

    return linear_head_loss(states, targets, rows_per_chunk=rows_per_chunk, **_options(model))


def _unreplaced(model: nn.Module) -> Callable[[], None]:
    """Return a function that raises if a tensor of a model is no longer the same object.

    The model without its head is a copy that holds the same tensors.
    """

    def tensors() -> dict[str, Tensor]:
        return dict(model.named_parameters()) | dict(model.named_buffers())

    known = tensors()

    def refuse_if_replaced() -> None:
        now = tensors()
        for name, tensor in known.items():
            if now.get(name) is not tensor:
                raise RuntimeError(
                    f"{name!r} of the model has been replaced since the loss was made: call "
                    "`language_model_loss(model)` again"
                )

    return refuse_if_replaced


def _refuse_head_in(trunk: nn.Module, names: Iterable[str], choice: str) -> None:
    """Raise if one of the modules of a choice has the output embedding."""
    for name in names:
        if any(isinstance(module, _Head) for module in trunk.get_submodule(name).modules()):
            raise ValueError(
                f"{choice} chooses {name!r}, which has the output embedding: choose layers, such "
                "as 'model.layers.*'"
            )


# Names of the parameters of a linear layer.
_OF_LINEAR = {"weight", "bias"}
# Tokens of the text, and size of the logits, on which a loss is compared with that of the model.
_TOKENS, _LARGE = 8, 100.0


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


def _without_head(model: nn.Module) -> nn.Module:
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
    if head._forward_pre_hooks or head._forward_hooks or set(head._parameters) != _OF_LINEAR:
        raise TypeError(
            f"the output embedding of {type(model).__name__} has hooks or a parametrised weight: "
            "use `composed` with the model's own logits"
        )
    return head


def _options(model: nn.Module) -> dict[str, Any]:
    """Return the scale and the bound of the logits from the config of a model."""
    config = getattr(model, "config", None)
    # Cohere multiplies logits, Granite divides them, Gemma 2 bounds them.
    factors = {name: getattr(config, name, None) for name in ("logit_scale", "logits_scaling")}
    numbers = {name: float(x) for name, x in factors.items() if isinstance(x, (int, float)) and x}
    scale = numbers.get("logit_scale", 1.0) / numbers.get("logits_scaling", 1.0)
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return {"scale": scale, "softcap": next((cap for cap in caps if cap), None)}


def _verified_shift(
    model: nn.Module, shift: bool | None, device: torch.device | None = None
) -> bool:
    """Return whether labels are shifted, after a comparison with the model on a short text.

    Raises:
        ValueError: If neither the logits nor the loss of the model are those of the head.
    """
    head, name = _head_of(model), type(model).__name__
    options: dict[str, Any] = {
        "trainable_only": False,
        "dtype": torch.promote_types(head.weight.dtype, torch.float32),
        "device": device,
    }
    model_fn, params = functional(model, **options)
    device = head.weight.device if device is None else device
    ids = torch.arange(_TOKENS, device=device).mul(3).add(1)[None] % len(head.weight)
    inputs = {"input_ids": ids}
    if _has_decoder(model):
        inputs["decoder_input_ids"] = ids
    trunk_fn, _ = functional(_without_head(model), **options)
    losses = {shifted: _loss_of(model, trunk_fn, shifted=shifted) for shifted in (True, False)}

    def evaluated(function: Callable[[Tree, Any], Any], batch: Any) -> Any:
        # Random layers draw the same masks in each evaluation.
        with torch.no_grad(), differentiable_twice(device):
            return function(params, batch)

    def logits() -> Tensor:
        outputs = evaluated(model_fn, inputs)
        found: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        return found[0]

    # Large logits show functions of them that are linear near zero.
    key = next(n for n, p in model.named_parameters() if p is head.weight)
    size = float(logits().abs().max())
    params[key] = params[key] * (_LARGE / size if size else 1.0)
    batch = inputs | {"labels": ids}
    right, ours = logits(), evaluated(losses[False].outputs, batch)[0].T
    tolerance = torch.finfo(right.dtype).eps ** 0.5 * float(right.abs().max())
    if right.shape != ours.shape or not float((right - ours).abs().max()) <= tolerance:
        raise ValueError(
            f"the logits of {name} are not those of its output embedding: use `composed` with the "
            "model's own logits"
        )
    if shift is not None:
        return shift
    try:
        own = evaluated(model_fn, batch).loss
    except (TypeError, AttributeError):
        own = None
    if own is not None:
        for candidate, loss in losses.items():
            if torch.isclose(evaluated(loss, batch).double(), own.double(), rtol=1e-3):
                return candidate
    raise ValueError(
        f"the loss of {name} is not the mean cross-entropy of its labels, shifted or not: pass "
        "shift=True if the output at a token predicts the next one, or shift=False"
    )


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _with_labels(batch: Any) -> Mapping[str, Any]:
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Sequence):
        raise TypeError(
            f"the labels of the batch are a {type(batch['labels']).__name__}, not a tensor: pass "
            "`torch.tensor(part)` for each part of the batch, or set `dataset.set_format('torch')`"
        )
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"the batch is {given}, but a language model needs a mapping with a tensor 'labels': "
            "pass for instance {'input_ids': ids, 'labels': ids}, with -100 where a token does not "
            "count"
        )
    return batch


def _inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return the arguments of the model.

    Raises:
        ValueError: If an argument would change the loss of the model itself.
    """
    given = {name: value for name, value in _with_labels(batch).items() if name != "labels"}
    for name in ("num_items_in_batch", "shift_labels"):
        if name in given:
            raise ValueError(
                f"the batch has {name!r}, which changes the loss of the model: leave it out, and "
                "pass `labels` alone"
            )
    if _has_decoder(model) and not given.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        raise ValueError(
            f"{type(model).__name__} needs 'decoder_input_ids' in the batch: pass for instance "
            "`model.prepare_decoder_input_ids_from_labels(labels)`"
        )
    return given
