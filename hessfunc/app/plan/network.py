"""What products are made of: a network and a batch, by their sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Of one number.
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

# Numbers that the graph of a Hessian product holds at its peak for each token, by least squares
# over ten GPTs of 2 to 24 layers, 96 to 256 wide: within 10 %, and 15 % where layers are computed
# again. `bench.graphs` measures them.
_KEPT = {"layer": 61.4, "score": 6.5, "logit": 7.6}
_AGAIN = {"residual": 3.0, "layer": 53.0, "score": 9.8, "logit": 4.7}


@dataclass(frozen=True)
class Network:
    """A network, whole on every rank, and the graph of one batch.

    Attributes:
        params: n, the entries of all leaves.
        largest: the entries of the largest leaf.
        dtype: of the parameters.
        activations: bytes of the graph of one batch, at the peak of a product, without what is as
            large as the parameters.
        recomputed: the same where layers are computed again, by ``functional(recompute=...)``;
            None where that is not known.
    """

    params: int
    largest: int
    dtype: str = "float32"
    activations: int = 0
    recomputed: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ValueError(f"dtype={self.dtype!r}: choose {', '.join(BYTES)}")
        if not 1 <= self.largest <= self.params:
            raise ValueError(
                f"largest={self.largest}: the largest leaf has 1 to {self.params} entries"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one parameter."""
        return BYTES[self.dtype]

    @property
    def rows_itemsize(self) -> int:
        """Bytes of one number of the vectors that algorithms work on, float32 at least."""
        return max(self.itemsize, 4)

    def computed_again(self) -> Network:
        """The network with layers that are computed again, where that is known."""
        if self.recomputed is None:
            return self
        return replace(self, activations=self.recomputed, recomputed=None)

    def in_bfloat16(self) -> Network:
        """The network with parameters and graphs in bfloat16."""
        shorter = BYTES["bfloat16"] / self.itemsize
        again = None if self.recomputed is None else round(shorter * self.recomputed)
        activations = round(shorter * self.activations)
        return replace(self, dtype="bfloat16", activations=activations, recomputed=again)


@dataclass(frozen=True)
class Transformer:
    """A causal transformer, by its sizes.

    Attributes:
        params: the entries of all leaves.
        layers: its depth.
        width: of what flows between layers.
        heads: of each layer.
        vocabulary: the outputs of the head.
    """

    params: int
    layers: int
    width: int
    heads: int
    vocabulary: int

    @classmethod
    def usual(cls, params: int, /, vocabulary: int = 32_000) -> Transformer:
        """Of the usual shape, where the number of parameters alone is known.

        params = 12 layers width^2, and the width is 100 times the depth: between GPT-3 of 125M
        (64) and of 6.7B (128), and that of Llama 2 of 70B. Heads are 128 wide.

        Source: Kaplan et al. 2020, arXiv 2001.08361 (params); Brown et al. 2020, arXiv 2005.14165,
        and Touvron et al. 2023, arXiv 2307.09288 (shapes).
        """
        layers = max(1, round((params / 120_000) ** (1 / 3)))
        width = max(1, round((params / (12 * layers)) ** 0.5))
        return cls(params, layers, width, max(1, round(width / 128)), vocabulary)

    @property
    def largest(self) -> int:
        """The entries of the largest leaf: the embedding, or a matrix of the feed-forward net."""
        return min(self.params, self.width * max(4 * self.width, self.vocabulary))

    def numbers(self, tokens: int, context: int, *, recompute: bool = False) -> float:
        """What the graph of a batch holds at the peak of a product, as measured on small ones.

        Args:
            tokens: of the batch.
            context: tokens that see each other; the scores of attention are kept.
            recompute: whether each layer is computed again from what flows between layers.
        """
        scores = self.heads * context
        if recompute:
            layer = _AGAIN["layer"] * self.width + _AGAIN["score"] * scores
            between = _AGAIN["residual"] * self.layers * self.width
            return tokens * (between + layer + _AGAIN["logit"] * self.vocabulary)
        layer = _KEPT["layer"] * self.width + _KEPT["score"] * scores
        return tokens * (self.layers * layer + _KEPT["logit"] * self.vocabulary)

    def network(self, dtype: str, *, tokens: int, context: int) -> Network:
        """The network, with a batch of so many tokens."""
        if dtype not in BYTES:
            raise ValueError(f"dtype={dtype!r}: choose {', '.join(BYTES)}")
        kept = round(BYTES[dtype] * self.numbers(tokens, context))
        again = round(BYTES[dtype] * self.numbers(tokens, context, recompute=True))
        return Network(self.params, self.largest, dtype, kept, again)
