"""Time and communication of a run, from the rates of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.app.plan.footprint import Setting

# Bytes of a float64, the dtype in which inner products are summed over ranks.
_WIDE = 8
# Times that a product of a sharded model exchanges all weights, as `bench.sharded` measures.
_WEIGHTS_SENT = 6
# Two small collectives per product: one before the sum, and one that checks finiteness.
_SMALL_COLLECTIVES = 2


def gradient_seconds(params: int, tokens: float, flops: float, /) -> float:
    """Return the seconds of one gradient, at 6 operations per parameter and token.

    Args:
        params: Number of parameters, each of which is used once per token.
        tokens: Number of tokens of one rank.
        flops: Operations per second that the rank reaches.

    Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
    """
    return 6 * params * tokens / flops


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.

    Attributes:
        gradient_seconds: Seconds of one gradient over the data of one rank.
        memory_bandwidth: Bytes per second at which vectors are read.
        network_bandwidth: Bytes per second that a rank sends.
        latency: Seconds of latency per collective.
        graph_gradients: Cost of building a graph, in gradients.
        product_gradients: Cost of a product through the graph, in gradients.
        host_bandwidth: Bytes per second at which vectors in host memory are read.
        batches: Number of batches of one rank, for each of which a sharded model gathers weights.
    """

    gradient_seconds: float
    memory_bandwidth: float
    network_bandwidth: float
    latency: float
    graph_gradients: float = 1.0
    product_gradients: float = 2.0
    host_bandwidth: float = 20.0 * 2**30
    batches: float = 1.0

    def cost(self, setting: Setting, vectors: int, workload: Workload | None = None, /) -> RunCost:
        """Return the cost of one step, or of one block product if no ``workload`` is given."""
        ranks = setting.ranks
        wide = setting.network.rows_itemsize
        numbers = vectors * setting.network.params
        share = (ranks - 1) / ranks
        reduced = 2 * share * (numbers + 2) * wide
        gathered = share * numbers * wide if setting.sharded else 0.0
        if setting.divided:
            # The weights are gathered and their gradients reduced, for each vector.
            reduced = 0.0
            gathered = _WEIGHTS_SENT * share * setting.network.weights * vectors * self.batches
        sums, collectives = 0.0, 0.0
        if ranks > 1:
            collectives = 1 + _SMALL_COLLECTIVES
        if ranks > 1 and setting.sharded:
            collectives += setting.gathers(vectors)
            if workload is not None:
                sums = 2 * share * workload.sums * _WIDE
                collectives += workload.exchanges
        traffic = workload.traffic / workload.steps if workload is not None else 0.0
        wire = reduced + gathered + sums
        gradients = self.graph_gradients + self.product_gradients * vectors
        return RunCost(
            reduced=reduced,
            gathered=gathered,
            sums=sums,
            products=gradients * self.gradient_seconds,
            vectors=traffic / self.memory_bandwidth,
            wire=wire / self.network_bandwidth + collectives * self.latency,
        )

    def in_all(self, setting: Setting, workload: Workload, /) -> RunCost:
        """Return the cost of a complete run, including its checks."""
        steps, checks = self.cost(setting, workload.block_size, workload), self.cost(setting, 1)
        return steps.times(workload.steps).plus(checks.times(workload.checks))


@dataclass(frozen=True)
class RunCost:
    """Communication and time of one rank.

    Attributes:
        reduced: Bytes sent to all-reduce the sums over batches.
        gathered: Bytes sent to gather vector blocks, or the weights of a sharded model.
        sums: Bytes sent to all-reduce inner products.
        products: Seconds of passes through the network.
        vectors: Seconds of reading the basis.
        wire: Seconds of communication.
    """

    reduced: float
    gathered: float
    sums: float
    products: float
    vectors: float
    wire: float

    @property
    def sent(self) -> float:
        """Total number of bytes sent."""
        return self.reduced + self.gathered + self.sums

    @property
    def seconds(self) -> float:
        """Total seconds, without any overlap of computation and communication."""
        return self.products + self.vectors + self.wire

    def times(self, count: float, /) -> RunCost:
        """Return the cost of ``count`` repetitions."""
        return RunCost(*(count * number for number in self._numbers))

    def plus(self, other: RunCost, /) -> RunCost:
        """Return the sum of two costs."""
        return RunCost(*(a + b for a, b in zip(self._numbers, other._numbers, strict=True)))

    @property
    def _numbers(self) -> tuple[float, ...]:
        return self.reduced, self.gathered, self.sums, self.products, self.vectors, self.wire


@dataclass(frozen=True)
class Workload:
    """Workload of one rank.

    Attributes:
        steps: Number of rounds of the algorithm, each with one block product.
        block_size: Number of vectors per block.
        checks: Maximum number of final products with one vector.
        traffic: Bytes of vectors that all steps read and write.
        sums: Number of float64 values that one step sums over the ranks, if vectors are sharded.
        exchanges: Number of collectives per step, without those of the products.
    """

    steps: int
    block_size: int
    checks: int
    traffic: float
    sums: float
    exchanges: float

    @property
    def products(self) -> int:
        """Maximum number of matrix-vector products."""
        return self.steps * self.block_size + self.checks
