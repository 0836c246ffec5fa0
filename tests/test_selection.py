"""Selection of leaves by name."""

import copy
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.selection import merge

PARAMS = {name: torch.zeros(i) for i, name in enumerate(("l1.w", "l1.b", "l2.w", "l2.b", "head"))}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("l1.*", ["l1.w", "l1.b"]),
        ("*.w", ["l1.w", "l2.w"]),
        ("l?.b", ["l1.b", "l2.b"]),
        ("head", ["head"]),
        (["head", "l1.w"], ["l1.w", "head"]),
        (["head", "l1.*"], ["l1.w", "l1.b", "head"]),
        ((name for name in ("head",)), ["head"]),
        (lambda name, tensor: "l" in name and len(tensor) > 1, ["l2.w", "l2.b"]),
    ],
)
def test_split_chooses_by_glob_names_or_predicate(pattern: Any, expected: list[str]) -> None:
    chosen, rest = hf.split(PARAMS, pattern)
    assert list(chosen) == expected
    assert list(rest) == [name for name in PARAMS if name not in expected]
    assert all(chosen[name] is PARAMS[name] for name in chosen)


def test_a_name_with_brackets_is_found_by_itself() -> None:
    tree = {"w[0]": torch.zeros(1), "w0": torch.zeros(1)}
    assert list(hf.split(tree, ["w[0]"])[0]) == ["w[0]"]


def test_split_sees_nested_mappings_by_dotted_names() -> None:
    tree = {"l1": {"w": torch.zeros(1), "b": torch.zeros(2)}, "l2": {"w": torch.zeros(3)}}
    chosen, rest = hf.split(tree, "*.w")
    assert chosen == {"l1": {"w": tree["l1"]["w"]}, "l2": {"w": tree["l2"]["w"]}}
    assert rest == {"l1": {"b": tree["l1"]["b"]}}


@pytest.mark.parametrize("pattern", ["l1.*", "*.b"])
def test_merge_undoes_split(pattern: str) -> None:
    tree = {"l1": {"w": torch.zeros(1), "b": torch.zeros(2)}, "l2": {"b": torch.zeros(3)}}
    before = copy.deepcopy(tree)
    whole = merge(*hf.split(tree, pattern))
    assert {k: set(v) for k, v in whole.items()} == {k: set(v) for k, v in before.items()}
    assert all(whole[k][name] is tree[k][name] for k in tree for name in tree[k])


@pytest.mark.parametrize(
    ("tree", "pattern", "error", "message"),
    [
        (PARAMS, "layer3.*", ValueError, "'layer3.*' chooses none of the leaves l1.w, .*, head$"),
        (PARAMS, ["head", "tail"], ValueError, "there is no leaf named tail among l1.w"),
        (PARAMS, ["l1.*", "l3.*"], ValueError, r"there is no leaf named l3\.\* among l1.w"),
        ({str(i): torch.zeros(1) for i in range(9)}, "x", ValueError, r", 7, \.\.\.$"),
        (PARAMS, lambda *_: False, ValueError, "chooses none of the leaves"),
        ({"a": [torch.zeros(1)]}, "a", TypeError, "'a' is a list"),
    ],
)
def test_a_split_that_cannot_be_meant_is_refused(
    tree: Any, pattern: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hf.split(tree, pattern)
