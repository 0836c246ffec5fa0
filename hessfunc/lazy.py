"""Package class that imports each public name on first use."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader


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
            message = f"module {self.__name__!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=self)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._HOMES, *self._FAMILIES})


class FamilyImporter:
    """Finder and loader that imports the families of a package by their public names.

    ``import package.family`` binds the module behind the family, and ``import
    package.family.part`` a submodule of it. Each module is loaded once, under its own name.

    Args:
        package: Name of the package.
        families: Submodule behind each public module, by name.
    """

    def __init__(self, package: str, families: Mapping[str, str]) -> None:
        self._package, self._families = package, families

    def install(self) -> None:
        """Put this importer before those that search the files of the package."""
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec of a module below a family's public name, or None for other modules."""
        return None if self._own_name(name) == name else ModuleSpec(name, cast("Loader", self))

    def create_module(self, spec: ModuleSpec) -> None:
        """Let the import system create a module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Replace a new, empty module in `sys.modules` by the module behind the public name."""
        sys.modules[module.__name__] = import_module(self._own_name(module.__name__))

    def _own_name(self, name: str) -> str:
        package, _, below = name.partition(".")
        family, dot, part = below.partition(".")
        if package != self._package or family not in self._families:
            return name
        return f"{package}.{self._families[family]}{dot}{part}"
