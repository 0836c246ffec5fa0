"""A directory of other files, or of a damaged state, is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hessfunc as hf
from tests.algorithms.checkpoint.problem import run_lanczos

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("manifest.json", "truncated"),
        ("manifest.json", "corrupted"),
        ("*.rows", "truncated"),
        ("*.rows", "corrupted"),
        ("*.rows", "missing"),
    ],
)
def test_a_damaged_state_is_refused_and_kept(kind: str, damage: str, tmp_path: Path) -> None:
    run_lanczos(tmp_path)
    victim = max(tmp_path.glob(kind), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        data = data[:-7] if damage == "truncated" else data
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="damaged, nothing was changed") as refusal:
        run_lanczos(tmp_path)
    assert "\n" not in str(refusal.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_directory_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        run_lanczos(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file is there"):
        run_lanczos(tmp_path / "file")


def test_files_of_others_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "measurements.rows").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(measurements.rows\)"):
        run_lanczos(tmp_path)
    run_lanczos(tmp_path / "run", max_matvecs=8)
    others = ["measurements.rows", "0" * 32 + ".rows", "notes.txt", "a.part"]
    for name in others:
        (tmp_path / "run" / name).write_text("precious")
    run_lanczos(tmp_path / "run")
    assert [(tmp_path / "run" / name).read_text() for name in others] == ["precious"] * 4


def test_a_manifest_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "app"}')
    with pytest.raises(ValueError, match=r"holds other files \(manifest.json\)"):
        run_lanczos(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "app"}'


@pytest.mark.parametrize(("name", "words"), [("x" * 300, "too long"), ("nul\0", "NUL")])
def test_a_path_that_cannot_be_a_directory_is_refused(
    tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        hf.lanczos(
            hf.dense(torch.eye(3)), torch.zeros(3), k=1, seed=0, checkpoint=f"{tmp_path}/{name}"
        )
