from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hessfunc as hf
from tests.reference.spectra import symmetric

MATVEC = hf.dense(symmetric(torch.arange(1.0, 9.0)))
LIKE = {"layer": {"weight": torch.zeros(2, 3).double()}, "bias": torch.zeros(2).double()}


@pytest.mark.parametrize(
    "result",
    [
        hf.lanczos(MATVEC, LIKE, k=2, seed=3),
        hf.power_iteration(MATVEC, torch.zeros(8).double(), k=1),
        hf.hutchinson(MATVEC, LIKE, max_matvecs=5),
        hf.slq(MATVEC, LIKE, steps=4),
    ],
    ids=lambda result: type(result).__name__,
)
def test_saved_and_loaded_is_the_same(result: hf.results.Estimate, tmp_path: Path) -> None:
    result.save(tmp_path / "result.npz")
    loaded = hf.load(tmp_path / "result.npz")
    assert type(loaded) is type(result)
    for item in dataclasses.fields(result):
        mine, saved = getattr(loaded, item.name), getattr(result, item.name)
        if isinstance(saved, str):
            assert mine == saved
        elif item.name not in ("versions", "by_leaf", "squared_frobenius"):
            torch.testing.assert_close(mine, saved, rtol=0, atol=0)
    if isinstance(result, hf.results.Estimate):
        assert result.squared_frobenius is not None
        assert loaded.squared_frobenius.interval() == result.squared_frobenius.interval()
    assert loaded.versions == result.versions
    assert [path.name for path in tmp_path.iterdir()] == ["result.npz"]


@pytest.mark.parametrize(
    ("like", "keys"),
    [
        ({1: torch.zeros(2), "1": torch.zeros(3)}, {1: (2,), "1": (3,)}),
        ({"a": {0: torch.zeros(2), "0": torch.zeros(3)}}, {"a": {0: (2,), "0": (3,)}}),
        ([torch.zeros(2), torch.zeros(3)], {"0": (2,), "1": (3,)}),
        ({7: [torch.zeros(2)], "b": torch.zeros(1)}, {7: {"0": (2,)}, "b": (1,)}),
    ],
    ids=["number and text", "nested", "list", "list in a dict"],
)
def test_keys_of_trees_stay_apart(like: Any, keys: Any, tmp_path: Path) -> None:
    found = hf.cg(lambda v: v, torch.utils._pytree.tree_map(torch.ones_like, like))
    found.save(tmp_path / "result.npz")
    loaded = hf.load(tmp_path / "result.npz")

    def shapes(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: shapes(one) for key, one in tree.items()}
        assert (tree == 1).all()
        return tuple(tree.shape)

    assert shapes(loaded.x) == keys


def test_keys_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    found = hf.cg(lambda v: v, {1.5: torch.ones(2), "1.5": torch.ones(3)})
    with pytest.raises(
        ValueError, match=r"x\[.*1\.5.*\] and x\[.*1\.5.*\] would have the same name"
    ):
        found.save(tmp_path / "result.npz")
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_result_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    with pytest.raises(ValueError, match="is not a result"):
        hf.load(tmp_path / "other.npz")


def cut(path: Path) -> None:
    result = hf.lanczos(MATVEC, LIKE, k=2, seed=0)
    result.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    hf.lanczos(MATVEC, LIKE, k=2, seed=0).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def of_kind(kind: str, **fields: Any) -> Callable[[Path], None]:
    text = json.dumps({"kind": kind, **fields}).encode()
    return lambda path: np.savez(path, result=np.frombuffer(text, dtype=np.uint8))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"hello" * 100), "is not a result"),
        (lambda path: path.write_bytes(b""), "is not a result"),
        (cut, "or is damaged"),
        (flipped, "or is damaged"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "is not a result"),
        (lambda path: np.savez(path, values=np.zeros(3)), "is not a result"),
        (of_kind("Nope"), "of class 'Nope', which this version of hessfunc does not have"),
        (of_kind("Estimate"), "is not a result"),
        (of_kind("Estimate", value={"paths": [["a"]]}), "is not a result"),
        (lambda path: torch.save({"a": 1}, path), "is not a result"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_a_file_that_holds_no_result_is_named(write: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "broken.npz")
    with pytest.raises(ValueError, match=f"broken.npz .*{message}"):
        hf.load(tmp_path / "broken.npz")


def test_results_are_frozen_and_say_what_made_them() -> None:
    result = hf.hutchinson(MATVEC, LIKE, max_matvecs=5)
    assert set(result.versions) >= {"torch", "numpy", "hessfunc"}
    assert isinstance(result.seed, int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = 0.0


def test_what_is_printed_fits_on_a_line_or_two() -> None:
    matrix = torch.diag(torch.linspace(-1, 3, 200).double())
    matvec, like = hf.dense(matrix), {"a": torch.zeros(150).double(), "b": torch.zeros(50).double()}
    top = hf.lanczos(matvec, like, k=12, seed=0)
    results = {
        "values=[3, ": top,
        "residual=": hf.cg(matvec, like, damping=2.0),
        "interval=[": hf.hutchinson(matvec, like, max_matvecs=20, seed=0),
        "nodes=[-1, 3]": hf.slq(matvec, like, steps=80, seed=0),
        "entries=200": hf.hutchinson_diagonal(matvec, like, max_matvecs=20, seed=0),
    }
    for text, result in results.items():
        printed = repr(result)
        assert text in printed
        assert f"matvecs={result.matvecs}" in printed
        assert result.reason in printed
        assert len(printed) < 500
        assert "tensor" not in printed
    assert "..." in repr(top)


@pytest.mark.parametrize("place", [".", "file/result.npz", "missing/result.npz", "nul\0.npz"])
def test_save_refuses_a_path_that_cannot_be_written_and_leaves_nothing(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("precious")
    made = hf.hutchinson(hf.dense(torch.eye(3)), torch.zeros(3), seed=0)
    target = tmp_path if place == "." else f"{tmp_path}/{place}"
    with pytest.raises(ValueError, match=r"cannot be written|NUL"):
        made.save(target)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]
    assert not tmp_path.with_name(tmp_path.name + ".part").exists()


def test_save_refuses_what_is_no_path() -> None:
    made = hf.hutchinson(hf.dense(torch.eye(3)), torch.zeros(3), seed=0)
    with pytest.raises(TypeError, match="path must be a path"):
        made.save(3)  # type: ignore[arg-type]
