from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import hessfunc as hf
from hessfunc.options import ARGUMENTS

FUNCTIONS = [hf.lanczos, hf.hutchinson, hf.slq, hf.cg, hf.over_batches, hf.functional, hf.landscape]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_each_argument_has_a_check(function: Callable[..., Any]) -> None:
    named = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    assert named
    assert set(named) <= ARGUMENTS.keys()


def test_checks_are_functions_of_a_name_and_a_value() -> None:
    for name, check in ARGUMENTS.items():
        inspect.signature(check).bind(name, None)
