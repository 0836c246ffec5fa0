"""The order of imports, without cycles, and the place of tests: one file for each module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

import hessfunc

SOURCES = Path(hessfunc.__file__).parent
TESTS = Path(__file__).parent

# Tests of no single module, by the folder or the file that holds them.
OF_NO_MODULE = {
    "accelerator": "all public functions on a device that is emulated",
    "bench": "benchmarks and what they measure",
    "docs": "pages and their examples",
    "distributed": "runs in several processes, which may be killed",
    "models": "whole models, small and trained",
    "app/report/test_browser.py": "a report in a browser",
    "test_architecture.py": "imports, and the place of tests",
    "test_default_device.py": "a default device of the user's own",
    "test_examples.py": "scripts of examples/",
    "test_fuzz.py": "calls of public functions at random",
    "test_import.py": "import of the package and its public names",
    "test_options.py": "wrong arguments of all public functions",
    "test_package.py": "the installed wheel",
    "test_project.py": "files of the project",
    "test_prose.py": "the language of all texts",
    "test_readme.py": "the code of the README",
}

# From the bottom to the top. Parts on one line do not import each other.
LAYERS = [
    {"changes", "lazy", "files", "numerics", "training_mode", "trees"},
    {"containers", "randomness", "ranks", "stored"},
    {"fingerprints", "copies"},
    {"options"},
    {"display", "memory"},
    {"selection", "spaces"},
    {"autograd"},
    {"losses"},
    {"linear_head"},
    {"sharding"},
    {"modules"},
    {"language_models"},
    {"transforms", "algorithms"},
    {"kronecker"},
    {"recipes", "optim"},
    {"tracking"},
    {"training"},
    {"plot"},
    {"compat"},
    {"app"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def module_of(file: Path) -> str:
    """Return the dotted name of a source file below the package."""
    parts = file.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in SOURCES.rglob("*.py")}


def imports_of(module: str) -> Iterator[str]:
    """Yield the modules of the package that a module imports, anywhere in its source."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for imported, name in names:
            package, _, below = imported.partition(".")
            if package == "hessfunc":
                submodule = f"{below}.{name}".lstrip(".")
                yield submodule if submodule in MODULES else below


def part(module: str) -> str:
    """Return the part of the library to which a module belongs."""
    return module.partition(".")[0]


INSIDE = [module for module in MODULES if module and part(module) != "__main__"]


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part(module) for module in INSIDE} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_go_down(name: str) -> None:
    upward = [
        f"{module} imports {target or 'hessfunc'}"
        for module in INSIDE
        if part(module) == name
        for target in imports_of(module)
        # The package as a whole is what users import; only the application may.
        if (part(target) != name and LEVEL.get(part(target), len(LAYERS)) >= LEVEL[name])
        and not (name == "app" and not target)
    ]
    assert not upward


def test_there_are_no_cycles() -> None:
    graph = {module: set(imports_of(module)) - {module} for module in INSIDE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_test_sees_imports_within_functions() -> None:
    inside = chain.from_iterable(imports_of(module) for module in INSIDE)
    assert "spaces.dtensors" in set(inside)


# Scripts import names of these with a star, or names that other modules define.
STARRED = {"hessfunc/compat/pyhessian/utils.py", "hessfunc/compat/eigenthings/power_iter.py"}


def test_only_packages_list_their_names() -> None:
    listing = {
        str(file.relative_to(TESTS.parent))
        for folder in (SOURCES, TESTS, TESTS.parent / "bench")
        for file in folder.rglob("*.py")
        if file.name != "__init__.py" and "\n__all__ =" in file.read_text()
    }
    assert listing == STARRED


def mirrored(module: Path) -> Path:
    """Return the path below `tests` of the file that tests a module."""
    return module.with_name(f"test_{module.name}")


# A package only gathers names, and the entry point is one line, run by tests of commands.
TESTED = {
    mirrored(file.relative_to(SOURCES))
    for file in MODULES.values()
    if file.name not in ("__init__.py", "__main__.py")
}
FOUND = {file.relative_to(TESTS) for file in TESTS.rglob("test_*.py")}


def test_each_module_has_its_test_file() -> None:
    assert not [str(file) for file in sorted(TESTED - FOUND)]


def test_each_test_file_has_its_module() -> None:
    elsewhere = {
        file
        for file in FOUND - TESTED
        if not any(file.is_relative_to(place) for place in OF_NO_MODULE)
    }
    assert not [str(file) for file in sorted(elsewhere)]


@pytest.mark.parametrize("place", OF_NO_MODULE)
def test_a_place_of_other_tests_is_there(place: str) -> None:
    assert (TESTS / place).exists()
