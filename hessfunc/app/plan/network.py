"""Sizes of a network and a batch, from which the memory of products follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# Bytes of one number, by dtype.
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

# Numbers that the graph of a Hessian product holds per token at its peak: a least-squares fit to
# ten GPTs with 2 to 24 layers of width 96 to 256. It is accurate within 10 %, or 15 % if layers
# are recomputed. `bench.graphs` measures the coefficients.
_KEPT = {"layer": 49.1, "score": 6.6, "logit": 7.5}
# Longest sequence whose attention keeps all scores, see `hessfunc.autograd.chunked_attention`.
_ALL_SCORES = 512
_AGAIN = {"residual": 3.0, "layer": 53.0, "score": 9.8, "logit": 4.7}
# The same for a fused head, which computes 2^22 logits at once: measured with 2^24 logits.
_FUSED = 7.0 * 2**22


@dataclass(frozen=True)
class Network:
    """Network and the graph of one batch.

    Attributes:
        params: Number of entries of all leaves, n, which is that of a vector.
        largest: Number of entries of the largest leaf.
        dtype: Name of the dtype of the parameters.
        activations: Bytes of the graph of one batch at the peak of a product, without tensors of
            the size of the parameters.
        recomputed: Bytes of that graph if layers are recomputed by ``functional(recompute=...)``;
            None if they are not known.
        fused: Bytes of the graph of one batch with `language_model_loss`, kept and recomputed; None
            if they are not known.
        frozen: Number of entries of parameters besides those of a vector.
        block: Number of entries of the largest layer, which a sharded model has whole while the
            layer runs; None if it is not known.
        outside: Number of entries of parameters outside of layers.
        stored: Name of the dtype in which weights are stored; None for ``dtype``.
    """

    params: int
    largest: int
    dtype: str = "float32"
    activations: int = 0
    recomputed: int | None = None
    fused: tuple[int, int] | None = None
    frozen: int = 0
    block: int | None = None
    outside: int = 0
    stored: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ValueError(f"dtype={self.dtype!r}: choose {', '.join(BYTES)}")
        if not 1 <= self.largest <= self.params:
            raise ValueError(
                f"largest={self.largest}: the largest leaf must have 1 to {self.params} entries"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one parameter."""
        return BYTES[self.dtype]

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return (self.params + self.frozen) * self.stored_itemsize

    @property
    def stored_itemsize(self) -> int:
        """Bytes of one stored parameter."""
        return BYTES[self.stored or self.dtype]

    @property
    def rows_itemsize(self) -> int:
        """Bytes of one entry of the vectors of algorithms, which are at least float32."""
        return max(self.itemsize, 4)

    def with_trainable(self, count: int, /) -> Network:
        """Return the network with vectors of so many entries, as of adapters or a head.

        Raises:
            ValueError: If it has fewer parameters.
        """
        every = self.params + self.frozen
        if not 1 <= count <= every:
            raise ValueError(f"trainable={count}: choose 1 to {every}, the number of parameters")
        return replace(self, params=count, largest=min(self.largest, count), frozen=every - count)

    def computed_again(self) -> Network:
        """Return the network with recomputed layers, or unchanged if their memory is not known."""
        if self.recomputed is None:
            return self
        fused = None if self.fused is None else (self.fused[1], self.fused[1])
        return replace(self, activations=self.recomputed, recomputed=None, fused=fused)

    def without_logits(self) -> Network:
        """Return the network with a fused head, or unchanged if that is not smaller or known."""
        if self.fused is None or self.fused[0] >= self.activations:
            return self
        kept, again = self.fused
        recomputed = None if self.recomputed is None else again
        return replace(self, activations=kept, recomputed=recomputed, fused=None)

    def in_microbatches(self, parts: int, /) -> Network:
        """Return the network with batches that are divided into ``parts``."""
        return self._scaled(1 / parts)

    def in_bfloat16(self) -> Network:
        """Return the network with parameters and graphs in bfloat16."""
        return replace(self._scaled(BYTES["bfloat16"] / self.itemsize), dtype="bfloat16")

    def stored_in_bfloat16(self) -> Network:
        """Return the network with weights in bfloat16 that compute in the present dtype."""
        return replace(self, stored="bfloat16")

    def _scaled(self, factor: float) -> Network:
        """Return the network with graphs of other sizes. A fused head has chunks of one size."""
        again = None if self.recomputed is None else math.ceil(factor * self.recomputed)
        return replace(self, activations=math.ceil(factor * self.activations), recomputed=again)


@dataclass(frozen=True)
class Transformer:
    """Sizes of a causal transformer.

    Attributes:
        params: Number of entries of all leaves.
        layers: Number of layers.
        width: Width of the residual stream.
        heads: Number of attention heads per layer.
        vocabulary: Number of outputs of the head.
    """

    params: int
    layers: int
    width: int
    heads: int
    vocabulary: int

    @classmethod
    def usual(cls, params: int, /, vocabulary: int = 32_000) -> Transformer:
        """Return a transformer of the usual shape with a given number of parameters.

        The shape satisfies params = 12 layers width^2 and width = 100 layers. GPT-3 has ratios
        width / layers from 64 (125M parameters) to 128 (6.7B); Llama 2 70B has about 100. Heads
        have width 128.

        Source: Kaplan et al. 2020, arXiv 2001.08361 (params); Brown et al. 2020, arXiv 2005.14165,
        and Touvron et al. 2023, arXiv 2307.09288 (shapes).
        """
        layers = max(1, round((params / 120_000) ** (1 / 3)))
        width = max(1, round((params / (12 * layers)) ** 0.5))
        return cls(params, layers, width, max(1, round(width / 128)), vocabulary)

    @property
    def largest(self) -> int:
        """Number of entries of the largest leaf: the embedding, or a feed-forward matrix."""
        return min(self.params, self.width * max(4 * self.width, self.vocabulary))

    def numbers(
        self, tokens: int, context: int, *, recompute: bool = False, fused: bool = False
    ) -> float:
        """Return how many numbers the graph of a batch holds at the peak of a product.

        The coefficients are fitted to small transformers.

        Args:
            tokens: Tokens per batch.
            context: Tokens per sequence. Up to 512 tokens, the graph keeps the attention scores;
                longer sequences attend in chunks.
            recompute: Whether each layer is recomputed from the residual stream.
            fused: Whether the head computes the logits of a few tokens at a time.
        """
        scores = self.heads * context if context <= _ALL_SCORES else 0
        kind = _AGAIN if recompute else _KEPT
        logits = _FUSED if fused else tokens * kind["logit"] * self.vocabulary
        layer = kind["layer"] * self.width + kind["score"] * scores
        if recompute:
            return tokens * (_AGAIN["residual"] * self.layers * self.width + layer) + logits
        return tokens * self.layers * layer + logits

    def network(self, dtype: str, *, tokens: int, context: int) -> Network:
        """Return the network with the graph of a batch of ``tokens`` tokens."""
        if dtype not in BYTES:
            raise ValueError(f"dtype={dtype!r}: choose {', '.join(BYTES)}")
        kept, again, fused, fused_again = (
            round(BYTES[dtype] * self.numbers(tokens, context, recompute=again, fused=fused))
            for fused in (False, True)
            for again in (False, True)
        )
        outside = min(self.params - 1, self.vocabulary * self.width)
        return Network(
            self.params,
            self.largest,
            dtype,
            kept,
            again,
            (fused, fused_again),
            block=-(-(self.params - outside) // self.layers),
            outside=outside,
        )
