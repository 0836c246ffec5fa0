"""What one rank holds at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hessfunc.app.plan.network import BYTES, Network

# Bytes, by what they are.
Held = dict[str, int]

# Entries of rows that `sharded` puts together at once.
_GATHERED = 2**22


@dataclass(frozen=True)
class Setting:
    """A network on ranks that divide the batches.

    Attributes:
        network: whole on every rank.
        ranks: R.
        sharded: whether the vectors are cut over the ranks, by `sharded`.
    """

    network: Network
    ranks: int = 1
    sharded: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks}: there is one at least")

    @property
    def parameters(self) -> Held:
        return {"parameters": self.network.params * self.network.itemsize}

    @property
    def width(self) -> int:
        """The entries of a vector that one rank holds."""
        return -(-self.network.params // self.ranks) if self.sharded else self.network.params

    @property
    def largest(self) -> int:
        """The entries of a leaf that one rank holds at the most."""
        return min(self.width, self.network.largest)

    @property
    def rows(self) -> int:
        """Bytes of the part of one vector."""
        return self.width * self.network.rows_itemsize

    def in_float64(self, entries: int) -> int:
        """Bytes of the copy that torch makes of entries to add them up in float64."""
        return 0 if self.network.rows_itemsize == BYTES["float64"] else BYTES["float64"] * entries

    def gathers(self, block: int) -> int:
        """In how many parts a block is put together."""
        if not self.sharded:
            return 0
        return -(-block // max(1, _GATHERED // self.network.params))


@dataclass(frozen=True)
class Moment:
    """What is alive on one rank at some place of the algorithm.

    Attributes:
        name: of the place.
        held: bytes, by what they are.
    """

    name: str
    held: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def without(self, what: str) -> Moment:
        return Moment(self.name, {name: size for name, size in self.held.items() if name != what})


def at_product(
    setting: Setting, block: int, around: Held, /, name: str = "a product", entry: int = 0
) -> Iterator[Moment]:
    """While a block is put together, and while its product with the mean over batches is made.

    The sum is the flat one of `over_batches`, block n + 2 numbers, float32 at least. The gradient
    belongs to the graph in reverse mode. Each leaf of the product is the sum of what two uses of
    the parameter give, forward and backward: the largest is there twice more as they are added.

    Args:
        setting: of the product.
        block: how many vectors, which go one by one through the graph.
        around: what else is alive, all but the parameters.
        name: of the place.
        entry: bytes of one number of the block, by default of one of the sum.
    """
    network = setting.network
    n, itemsize, wide = network.params, network.itemsize, network.rows_itemsize
    entry = entry or wide
    converted = itemsize != entry
    if setting.sharded:
        few = -(-block // setting.gathers(block))
        part = few * (n + setting.width) * entry
        whole = {"block, whole": block * n * entry}
        exchanged = max(part, block * n * itemsize if converted else 0)
        yield Moment(
            f"{name}: its block is put together",
            setting.parameters | around | whole | {"exchange": exchanged},
        )
    one_by_one = n if block > 1 else 0
    yield Moment(
        name,
        setting.parameters
        | around
        | {
            "block, whole": block * n * itemsize if setting.sharded or converted else 0,
            "sum over batches": (block * n + 2) * wide,
            "product": (block * n + one_by_one + 2 * network.largest) * itemsize,
            "graph: gradient": n * itemsize,
            "graph: activations": network.activations,
        },
    )
