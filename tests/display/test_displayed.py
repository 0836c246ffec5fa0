"""All displays of all results; a class without a sample fails."""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import math
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.results import LeafEstimate, Result
from hessfunc.display import Displayed
from hessfunc.kronecker import Block
from hessfunc.kronecker.composite_blocks import _Reordered
from hessfunc.recipes.block_spectra import BlockSpectra
from tests import public
from tests.display.samples import SAMPLES

# Bases without instances of their own.
ABSTRACT = {Result, Block, _Reordered}
# Classes that public functions return, which are functions, optimisers or their parts.
OTHERS = {
    *("Criterion", "FactoredCurvature", "Layer", "LinearHeadLoss", "Loss", "Newton", "Schedule"),
    *("ShardedSpace", "Tracking"),
}


def below(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield kind
        yield from below(kind)


def modules() -> None:
    for module in pkgutil.walk_packages(hf.__path__, "hessfunc."):
        if not module.name.startswith(("hessfunc.app", "hessfunc.__main__")):
            importlib.import_module(module.name)


def test_each_class_has_a_sample() -> None:
    modules()
    kinds = {kind for kind in below(Displayed) if kind.__module__.startswith("hessfunc.")}
    assert kinds - ABSTRACT == set(SAMPLES)
    assert all(type(make()) is kind for kind, make in SAMPLES.items())


def test_each_class_that_a_function_returns_is_displayed() -> None:
    found = set()
    for function in public.functions().values():
        plain = inspect.unwrap(function)
        answer = plain.__globals__.get(plain.__annotations__.get("return"))
        if inspect.isclass(answer) and answer.__module__.startswith("hessfunc."):
            found.add(answer)
    assert len(found) > 8
    assert {kind.__name__ for kind in found if not issubclass(kind, Displayed)} == OTHERS


class Parsed(HTMLParser):
    """Texts of the cells, and the open elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def results() -> dict[type, Displayed]:
    return {kind: make() for kind, make in SAMPLES.items()}


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
def test_displays(kind: type, results: dict[type, Displayed]) -> None:
    result = results[kind]
    text = repr(result)
    assert kind.__name__ in text
    assert len(text.splitlines()) <= 10
    assert len(text) < 1500
    assert "tensor(" not in text

    html = result._repr_html_()
    page = Parsed(html)
    assert not page.open
    names, values = page.cells[::2], page.cells[1::2]
    assert values == list(result._summary().values())
    assert [name.replace(" ", "_") for name in names] == [
        name.replace(" ", "_") for name in result._summary()
    ]
    if kind is not LeafEstimate:
        assert all(value in text for value in values)
    # No colour of its own, so that light and dark pages both show it.
    assert "#" not in html.replace("http://www.w3.org", "").replace("&#", "")

    made = result.to_dict()
    assert made["kind"] == kind.__name__
    assert json.loads(json.dumps(made)).keys() == made.keys()
    small = result.to_dict(vectors=False)
    assert small.keys() <= made.keys()
    assert len(json.dumps(small)) <= len(json.dumps(made))


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
def test_tables(kind: type, results: dict[type, Displayed]) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = results[kind].to_pandas()
    assert len(table) >= 1
    assert len(set(table.columns)) == len(table.columns)
    assert not any(isinstance(x, torch.Tensor) for x in table.to_numpy().flat)


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "same", [copy, deepcopy, lambda result: pickle.loads(pickle.dumps(result))]
)
def test_copies_and_pickles(
    kind: type, same: Callable[[Displayed], Displayed], results: dict[type, Displayed]
) -> None:
    result = results[kind]
    found = same(result)
    assert type(found) is kind
    assert str(found.to_dict()) == str(result.to_dict())


def test_figures_of_densities_and_eigenvalues(results: dict[type, Displayed]) -> None:
    for kind in (hf.results.Density, hf.results.Eigenpairs, hf.tracking.Points):
        assert "<svg" in results[kind]._repr_html_()
        assert "currentColor" in results[kind]._repr_html_()
    assert "<svg" not in results[hf.results.Estimate]._repr_html_()


def test_numbers_of_the_table_of_eigenvalues(results: dict[type, Displayed]) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = results[hf.results.Eigenpairs].to_pandas()
    assert table["value"].round(9).tolist() == [8.0, 7.0, 6.0]
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


def test_the_table_of_an_estimate_adds_up(results: dict[type, Displayed]) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = results[hf.results.Estimate].to_pandas()
    assert table["leaf"].tolist() == ["total", "a<b>", "bias"]
    assert math.isclose(table["value"][0], table["value"][1:].sum())


def test_the_table_of_spectra_has_all_blocks() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    results = {"a": SAMPLES[hf.results.Density](), "b": SAMPLES[hf.results.Eigenpairs](), "c": 3.0}
    table = BlockSpectra(results).to_pandas()
    assert table.groupby("block").size().to_dict() == {"a": 8, "b": 3, "c": 1}


def test_names_are_escaped() -> None:
    spectra = hf.block_spectra(
        lambda p, b: p["<script>"] @ p["<script>"], {"<script>": torch.ones(3)}, [0],
        weight=lambda b: 1.0,
    )  # fmt: skip
    assert "<script>" not in spectra._repr_html_()
    assert "&lt;script&gt;" in spectra._repr_html_()


def test_plain_data_keeps_vectors_only_if_asked() -> None:
    pairs = hf.lanczos(hf.dense(torch.eye(3)), {"w": torch.zeros(3)}, k=1, seed=0)
    assert len(pairs.to_dict()["vectors"]["w"][0]) == 3
    assert "vectors" not in pairs.to_dict(vectors=False)


def test_a_missing_pandas_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        SAMPLES[hf.results.Check]().to_pandas()
