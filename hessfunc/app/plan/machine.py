"""What time work takes, by the rates of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.app.plan.footprint import Setting

# Bytes of a number in which vectors of several ranks are added up: float64.
_WIDE = 8
# What ranks tell each other before a sum, and that a product is finite.
_TOLD = 2


def gradient_seconds(params: int, tokens: float, flops: float, /) -> float:
    """A gradient of the loss of so many tokens takes 6 operations a parameter and token.

    Args:
        params: of a network whose parameters each take part once for each token.
        tokens: of one rank.
        flops: operations a second that the rank reaches.

    Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
    """
    return 6 * params * tokens / flops


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.

    Attributes:
        gradient_seconds: of one gradient over what one rank has of the data.
        memory_bandwidth: bytes a second that vectors are read with.
        network_bandwidth: bytes a second that a rank sends.
        latency: seconds that a collective takes besides.
        graph_gradients: what making a graph costs, in gradients.
        product_gradients: what a product through it costs.
    """

    gradient_seconds: float
    memory_bandwidth: float
    network_bandwidth: float
    latency: float
    graph_gradients: float = 1.0
    product_gradients: float = 2.0

    def cost(self, setting: Setting, block: int, work: Work | None = None, /) -> Cost:
        """Of one step, or of one product with a block alone."""
        ranks = setting.ranks
        wide = setting.network.rows_itemsize
        numbers = block * setting.network.params
        share = (ranks - 1) / ranks
        reduced = 2 * share * (numbers + 2) * wide
        gathered = share * numbers * wide if setting.sharded else 0.0
        sums, collectives = 0.0, 0.0
        if ranks > 1:
            collectives = 1 + _TOLD
        if ranks > 1 and setting.sharded:
            collectives += setting.gathers(block)
            if work is not None:
                sums = 2 * share * work.sums * _WIDE
                collectives += work.exchanges
        traffic = work.traffic / work.steps if work is not None else 0.0
        wire = reduced + gathered + sums
        gradients = self.graph_gradients + self.product_gradients * block
        return Cost(
            reduced=reduced,
            gathered=gathered,
            sums=sums,
            products=gradients * self.gradient_seconds,
            vectors=traffic / self.memory_bandwidth,
            wire=wire / self.network_bandwidth + collectives * self.latency,
        )

    def in_all(self, setting: Setting, work: Work, /) -> Cost:
        """Of a whole run, with all of its checks."""
        steps, checks = self.cost(setting, work.block, work), self.cost(setting, 1)
        return steps.times(work.steps).plus(checks.times(work.checks))


@dataclass(frozen=True)
class Cost:
    """What one rank sends, and how long it takes.

    Attributes:
        reduced: bytes sent for the sums over batches.
        gathered: bytes sent for blocks to be whole.
        sums: bytes sent for inner products.
        products: seconds of passes through the network.
        vectors: seconds of reading the basis.
        wire: seconds of sending.
    """

    reduced: float
    gathered: float
    sums: float
    products: float
    vectors: float
    wire: float

    @property
    def sent(self) -> float:
        """Bytes."""
        return self.reduced + self.gathered + self.sums

    @property
    def seconds(self) -> float:
        """Nothing is done at the same time."""
        return self.products + self.vectors + self.wire

    def times(self, count: float, /) -> Cost:
        return Cost(*(count * number for number in self._numbers))

    def plus(self, other: Cost, /) -> Cost:
        return Cost(*(a + b for a, b in zip(self._numbers, other._numbers, strict=True)))

    @property
    def _numbers(self) -> tuple[float, ...]:
        return self.reduced, self.gathered, self.sums, self.products, self.vectors, self.wire


@dataclass(frozen=True)
class Work:
    """The work of one rank.

    Attributes:
        steps: rounds of the algorithm, each with one block of products.
        block: the vectors of these blocks.
        checks: products of one vector that follow at the most.
        traffic: bytes of vectors that all steps read and write.
        sums: numbers of float64 that are added up over ranks in one step, where vectors are
            sharded.
        exchanges: collectives of one step, those of the products not counted.
    """

    steps: int
    block: int
    checks: int
    traffic: float
    sums: float
    exchanges: float

    @property
    def products(self) -> int:
        """With one vector, at the most."""
        return self.steps * self.block + self.checks
