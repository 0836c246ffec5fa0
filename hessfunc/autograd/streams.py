"""Random draws of a loss from generators of its own, instead of the process's random streams.

Other threads neither change these draws nor see them. On a CPU, the numbers are those that torch
draws after ``torch.manual_seed(seed)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.attention import attended, for_each_query_head
from hessfunc.autograd.overrides import Replacements, current
from hessfunc.numerics import indexed


class Streams:
    """Random streams of one evaluation, one for each device, that start at the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of a device, or None for a device without values.

        Raises:
            NotImplementedError: Inside `torch.utils.checkpoint`.
        """
        if device.type == "meta":
            return None
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and "checkpoint" in hooks[0].__qualname__:
            raise NotImplementedError(
                "a random layer inside torch.utils.checkpoint would draw other numbers when it is "
                "recomputed: call `model.eval()`, or turn checkpointing off and use "
                "functional(model, recompute='model.layers.*')"
            )
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def state(self) -> dict[torch.device, Tensor]:
        """Return the present state of each generator, for `resumed`."""
        return {device: g.get_state() for device, g in self._generators.items()}

    def resumed(self, state: dict[torch.device, Tensor]) -> Streams:
        """Return new streams that continue from a state."""
        streams = Streams(self._seed)
        for device, numbers in state.items():
            streams._generators[device] = torch.Generator(device)
            streams._generators[device].set_state(numbers)
        return streams

    def replacements(self, given: Replacements) -> Replacements:
        """Return the replacements of all random functions of torch by draws from these streams.

        Args:
            given: Other replacements, which compute attention and recurrent layers without dropout.
        """
        attention = given.get(F.scaled_dot_product_attention, F.scaled_dot_product_attention)
        return {
            **{f: functools.partial(_with_generator, f, self) for f in _TAKE_A_GENERATOR},
            **{f: functools.partial(draw, self) for f, draw in _COMPOSED.items()},
            **{f: functools.partial(_recurrent, given.get(f, f), self) for f in _RECURRENT},
            F.scaled_dot_product_attention: functools.partial(_attention, attention, self),
        }


def replay(device: torch.device, /) -> Callable[[], Streams]:
    """Return a function that returns streams which repeat the draws from here on.

    They repeat the draws of the active mode, or of torch's own streams if no mode has streams.

    Args:
        device: Device of the draws besides the CPU.
    """
    mode = current()
    if mode is not None and isinstance(mode.source, Streams):
        streams, state = mode.source, mode.source.state()
    else:
        streams, state = Streams(), {torch.device("cpu"): torch.random.get_rng_state()}
        if device.type == "cuda":
            state[device] = torch.cuda.get_rng_state(device)
    return lambda: streams.resumed(state)


def _with_generator(function: Any, streams: Streams, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("generator") is None:
        kwargs["generator"] = streams.on(_device_of(args, kwargs))
    return function(*args, **kwargs)


def _device_of(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device:
    if (device := kwargs.get("device")) is not None:
        return indexed(device)
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device
    return torch.get_default_device()


# Slope of SELU for negative numbers, times its scale.
_SATURATION = 1.7580993408473766


def _dropout(
    streams: Streams,
    input: Tensor,
    p: float = 0.5,
    train: bool = True,
    *,
    of_channels: bool = False,
    alpha: bool = False,
) -> Tensor:
    """Compute dropout as torch does on a CPU: one draw for each entry, or for each channel."""
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * torch.zeros_like(input)
    shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if of_channels else None
    noise = torch.empty_like(input) if shape is None else input.new_empty(shape)
    noise.bernoulli_(1 - p, generator=streams.on(input.device))
    if not alpha:
        return input * noise.div_(1 - p)
    scale = 1 / math.sqrt((_SATURATION**2 * p + 1) * (1 - p))
    shift = (noise - 1).mul_(_SATURATION * scale).add_(_SATURATION * scale * p)
    return input * noise.mul_(scale) + shift


def _dropout_in_place(streams: Streams, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.copy_(_dropout(streams, input, *args, **kwargs))


def _native_dropout(
    streams: Streams, input: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor]:
    mask = _dropout(streams, torch.ones_like(input), p, train is not False)
    return input * mask, mask != 0


def _rrelu(
    streams: Streams,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    if not training:
        return torch.rrelu(input, lower, upper, training)
    chosen = streams.on(input.device) if generator is None else generator
    slopes = torch.empty_like(input).uniform_(lower, upper, generator=chosen)
    return torch.where(input > 0, input, slopes * input)


def _rrelu_in_place(streams: Streams, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.copy_(_rrelu(streams, input, *args, **kwargs))


def _attention(
    attention: Any,
    streams: Streams,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    if dropout_p == 0:
        return attention(query, key, value, attn_mask, 0.0, is_causal, **options)
    _, weights = attended(query, key, value, attn_mask, is_causal, **options)
    if options.get("enable_gqa"):
        value = for_each_query_head(value, query)
    return _dropout(streams, weights, dropout_p) @ value


def _recurrent(function: Any, streams: Streams, *args: Any) -> Any:
    """Evaluate a stack of recurrent layers one after another, with dropout between them."""
    # (input, hx, weights, biases, ...), or (data, sizes, hx, weights, biases, ...) if packed.
    packed = not isinstance(args[3], bool)
    sizes, (hidden, weights, biases, count, p, train, *rest) = (
        args[1 : 1 + packed],
        args[1 + packed :],
    )
    if not (train and p and count > 1):
        return function(*args)
    several = isinstance(hidden, (list, tuple))
    states = [h.chunk(count) for h in (hidden if several else [hidden])]
    each = len(weights) // count
    x, ends = args[0], []
    for i in range(count):
        x = x if i == 0 else _dropout(streams, x, p)
        own = [h[i] for h in states] if several else states[0][i]
        layer = weights[i * each : (i + 1) * each]
        x, *end = function(x, *sizes, own, layer, biases, 1, 0.0, train, *rest)
        ends.append(end)
    return x, *(torch.cat(end) for end in zip(*ends, strict=True))


_TAKE_A_GENERATOR = (
    *(torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint),
    *(torch.randint_like, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial),
    *(torch.poisson, torch.binomial, torch._standard_gamma, torch._sample_dirichlet),
    *(Tensor.bernoulli, Tensor.bernoulli_, Tensor.multinomial, Tensor.normal_, Tensor.uniform_),
    *(Tensor.random_, Tensor.exponential_, Tensor.cauchy_, Tensor.geometric_, Tensor.log_normal_),
)

_COMPOSED: dict[Any, Callable[..., Any]] = {
    torch.dropout: _dropout,
    torch.dropout_: _dropout_in_place,
    torch.feature_dropout: functools.partial(_dropout, of_channels=True),
    torch.feature_dropout_: functools.partial(_dropout_in_place, of_channels=True),
    torch.alpha_dropout: functools.partial(_dropout, alpha=True),
    torch.alpha_dropout_: functools.partial(_dropout_in_place, alpha=True),
    torch.feature_alpha_dropout: functools.partial(_dropout, of_channels=True, alpha=True),
    torch.feature_alpha_dropout_: functools.partial(
        _dropout_in_place, of_channels=True, alpha=True
    ),
    torch.native_dropout: _native_dropout,
    torch.rrelu: _rrelu,
    torch.rrelu_: _rrelu_in_place,
}

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
