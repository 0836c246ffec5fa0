"""The examples in the docstrings of public functions, with ``torch`` and ``hf`` at hand."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import hessfunc as hf
from tests import public

_PARSER = doctest.DocTestParser()


def examples() -> dict[str, doctest.DocTest]:
    """Return the examples of each public name that has some."""
    tests = {}
    for name, value in public.names().items():
        text = inspect.getdoc(value) or ""
        test = _PARSER.get_doctest(text, {"torch": torch, "hf": hf}, name, None, 0)
        if test.examples:
            tests[name] = test
    return tests


@pytest.mark.parametrize("name", examples())
def test_examples_give_what_they_show(name: str) -> None:
    complaints: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runner.run(examples()[name], out=complaints.append)
    assert not complaints, "".join(complaints)


def test_most_functions_have_examples() -> None:
    functions = {name for name in hf._HOMES if inspect.isfunction(getattr(hf, name))}
    shown = {name.rpartition(".")[2] for name in examples()}
    assert len(shown & functions) > 0.7 * len(functions)


def test_examples_fit_beside_the_menus() -> None:
    lines = [
        line
        for test in examples().values()
        for example in test.examples
        for line in (*example.source.splitlines(), *example.want.splitlines())
    ]
    assert [line for line in lines if len(line) > 84] == []
