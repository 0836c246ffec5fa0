"""Memory of one rank at a phase of an algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hessfunc.app.plan.network import BYTES, Network

# Bytes of each kind of tensor.
Held = dict[str, int]

# Entries of rows that `sharded` gathers at once.
_GATHERED = 2**22


@dataclass(frozen=True)
class Setting:
    """Network on ranks that divide the batches.

    Attributes:
        network: Network.
        ranks: Number of ranks, R.
        sharded: Whether the vectors are sharded over the ranks by `sharded`.
        divided: Whether parameters and vectors are divided among the ranks by
            ``functional(model, mesh=mesh, shard=...)``; otherwise the network is replicated.
    """

    network: Network
    ranks: int = 1
    sharded: bool = True
    divided: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks}: at least one rank is required")

    @property
    def parameters(self) -> Held:
        """Bytes of the parameters, as an entry of `Held`."""
        parts = self.ranks if self.divided else 1
        return {"parameters": -(-self.network.weights // parts)}

    @property
    def width(self) -> int:
        """Number of entries of a vector that one rank holds."""
        parts = self.ranks if self.sharded or self.divided else 1
        return -(-self.network.params // parts)

    @property
    def largest(self) -> int:
        """Maximum number of entries of one leaf that a rank holds."""
        return min(self.width, self.network.largest)

    @property
    def rows(self) -> int:
        """Bytes of the part of one vector that one rank holds."""
        return self.width * self.network.rows_itemsize

    def in_float64(self, entries: int) -> int:
        """Return the bytes of the copy that torch makes to sum so many entries in float64."""
        return 0 if self.network.rows_itemsize == BYTES["float64"] else BYTES["float64"] * entries

    def gathers(self, vectors: int) -> int:
        """Return the number of parts in which a vector block is gathered."""
        if not self.sharded or self.divided:
            return 0
        return -(-vectors // max(1, _GATHERED // self.network.params))


@dataclass(frozen=True)
class Moment:
    """Tensors that are alive on one rank during a phase of the algorithm.

    Attributes:
        name: Name of the phase.
        held: Bytes of each kind of tensor.
    """

    name: str
    held: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.held.values())

    def without(self, what: str) -> Moment:
        """Return the phase without the tensors of one kind."""
        return Moment(self.name, {name: size for name, size in self.held.items() if name != what})


def at_product(
    setting: Setting, vectors: int, around: Held, /, name: str = "a product", entry: int = 0
) -> Iterator[Moment]:
    """Yield the phases of one block product: the gathering of the block, and the product.

    The sum over batches is the flat buffer of `over_batches`: vectors n + 2 numbers in at least
    float32. In reverse mode, the graph includes the gradient. Each leaf of the product adds the
    contributions of two uses of its parameter, in the forward and in the backward pass. Two more
    copies of the largest leaf are alive during this addition.

    Args:
        setting: Network and ranks.
        vectors: Number of vectors, which pass through the graph one by one.
        around: Bytes of the other tensors that are alive, without the parameters.
        name: Name of the phase.
        entry: Bytes of one entry of the block; 0 for those of an entry of the sum.
    """
    network = setting.network
    n, itemsize, wide = network.params, network.itemsize, network.rows_itemsize
    entry = entry or wide
    converted = itemsize != entry
    if setting.divided:
        yield _of_shards(setting, vectors, around, name)
        return
    if setting.sharded:
        few = -(-vectors // setting.gathers(vectors))
        part = few * (n + setting.width) * entry
        whole = {"full block": vectors * n * entry}
        exchanged = max(part, vectors * n * itemsize if converted else 0)
        yield Moment(
            f"{name}: gathering its block",
            setting.parameters | around | whole | {"exchange": exchanged},
        )
    one_by_one = n if vectors > 1 else 0
    yield Moment(
        name,
        setting.parameters
        | around
        | {
            "full block": vectors * n * itemsize if setting.sharded or converted else 0,
            "sum over batches": (vectors * n + 2) * wide,
            "product": (vectors * n + one_by_one + 2 * network.largest) * itemsize,
            "graph: gradient": n * network.stored_itemsize,
            "graph: activations": network.activations,
        },
    )


# Copies of a block that a rank has whole: its weights, their tangent and their cotangent.
_GATHERED_COPIES = 3


def _of_shards(setting: Setting, vectors: int, around: Held, name: str) -> Moment:
    """Return the phase of one block product of a sharded model, whose layers are recomputed."""
    network, width = setting.network, setting.width
    again = network.computed_again().activations
    gathered = (network.block or 0) + network.outside
    return Moment(
        name,
        setting.parameters
        | around
        | {
            "sum over batches": (vectors * width + 2) * network.rows_itemsize,
            "product": ((vectors + 1) * width + 2 * setting.largest) * network.itemsize,
            "graph: parameters": width * network.stored_itemsize,
            "graph: activations": again,
            "gathered block": _GATHERED_COPIES * gathered * network.itemsize,
        },
    )
