"""Package class that imports each public name on first use."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """Class of a package whose public names are imported on first use.

    Attributes:
        _HOMES: Submodule that defines each public name, by name.
        _FAMILIES: Submodule behind each public module, by name.
    """

    _HOMES: dict[str, str]
    _FAMILIES: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name in self._HOMES:
            value = getattr(import_module(f"{self.__name__}.{self._HOMES[name]}"), name)
        elif name in self._FAMILIES:
            value = import_module(f"{self.__name__}.{self._FAMILIES[name]}")
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._HOMES, *self._FAMILIES})
