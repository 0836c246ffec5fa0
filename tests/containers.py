"""Containers of a batch: an input x and targets y, in every kind of object."""

import dataclasses
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Tensor
    y: Tensor


class Plain:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Private:
    __slots__ = ("__x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.__x, self.y = x, y

    @property
    def x(self) -> Tensor:
        return self.__x


class Attributes(dict[str, Tensor]):
    """A dict whose items are attributes."""

    def __init__(self, **items: Tensor) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Elements(list[Tensor]):
    @property
    def x(self) -> Tensor:
        return self[0]

    @property
    def y(self) -> Tensor:
        return self[1]


class OfTuple(tuple[Tensor, ...]):
    x = property(lambda self: self[0])
    y = property(lambda self: self[1])


class Parent:
    """An object that its own parts refer to."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.part = SimpleNamespace(x=x, y=y, parent=self)

    x = property(lambda self: self.part.parent.part.x)
    y = property(lambda self: self.part.parent.part.y)


class OfDict(UserDict[str, Tensor]):
    x = property(lambda self: self["x"])
    y = property(lambda self: self["y"])


OBJECTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "named tuple": Pair,
    "frozen dataclass": Frozen,
    "dataclass with slots": Slotted,
    "object": Plain,
    "private slot": Private,
    "namespace": lambda x, y: SimpleNamespace(x=x, y=y),
    "dict with attributes": lambda x, y: Attributes(x=x, y=y),
    "list subclass": lambda x, y: Elements([x, y]),
    "tuple subclass": lambda x, y: OfTuple((x, y)),
    "cycle": Parent,
    "UserDict": lambda x, y: OfDict({"x": x, "y": y}),
}
