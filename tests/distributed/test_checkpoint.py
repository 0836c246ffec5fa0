"""A run whose vectors are cut over ranks is taken up again, on as many ranks or on others."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hessfunc as hf
from hessfunc.trees import leaves
from tests.distributed import dtensors, problems
from tests.distributed.ranks import Ranks

# By the name of the run: the budget of its first part, and of the whole.
RUNS = {
    "power_iteration": (7, 16),
    "lanczos": (8, 20),
    "lanczos, restarted": (14, 28),
    "hutchinson": (10, 30),
    "hutchpp": (12, 30),
    "xtrace": (12, 30),
    "xnystrace": (10, 30),
    "hutchinson_diagonal": (10, 30),
    "xdiag": (12, 30),
    # The budget decides between Krylov vectors and probes, but not before the first four probes.
    "trace": (4, 30),
    "diagonal": (4, 30),
    "slq": (15, 36),
    "logdet": (12, 30),
    "cg": (6, 60),
    "minres": (6, 60),
    "function": (6, 60),
}


def run(name: str, path: Path | None, ranks: int, most: int, pause: float = 0.0) -> list[Tensor]:
    """What the run found, as plain tensors, and the products that it made."""
    matvec = problems.as_matvec(problems.symmetric(positive=True))
    solves = name in problems.SOLVERS
    like = problems.vector() if solves else problems.like()
    found = (problems.ALGORITHMS | problems.SOLVERS)[name](
        matvec,
        like,
        max_matvecs=most,
        space=hf.sharded(like, problems.mesh(ranks)) if ranks > 1 else None,
        checkpoint=path,
        callback=lambda _: time.sleep(pause),
        **({} if solves else {"seed": 3}),
    )
    if solves:
        # A budget that was spent ends with a product more, to measure the residual.
        return leaves(found.x)
    kinds = {hf.results.Eigenpairs: "values", hf.results.Density: "nodes"}
    numbers = leaves(getattr(found, kinds.get(type(found), "value")))
    return [torch.as_tensor(x) for x in (*numbers, found.matvecs)]


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    return all(
        torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_other_ranks(
    name: str, tmp_path: Path, two: Ranks, three: Ranks
) -> None:
    few, most = RUNS[name]
    wanted = run(name, None, 1, most)
    three.run(run, name, tmp_path / "down", 3, few)
    for found in two.run(run, name, tmp_path / "down", 2, most):
        assert same(found, wanted, 1e-8)
    two.run(run, name, tmp_path / "up", 2, few)
    for found in three.run(run, name, tmp_path / "up", 3, most):
        assert same(found, wanted, 1e-8)
    assert same(run(name, tmp_path / "up", 1, most), wanted, 1e-8)
    run(name, tmp_path / "alone", 1, few)
    for found in two.run(run, name, tmp_path / "alone", 2, most):
        assert same(found, wanted, 1e-8)


@pytest.mark.parametrize("name", ["lanczos, restarted", "slq"])
def test_a_run_that_goes_on_with_the_same_ranks_has_the_same_bits(
    name: str, tmp_path: Path, two: Ranks
) -> None:
    few, most = RUNS[name]
    wanted = two.run(run, name, None, 2, most)
    two.run(run, name, tmp_path / "run", 2, few)
    assert [
        same(*pair, 0.0)
        for pair in zip(two.run(run, name, tmp_path / "run", 2, most), wanted, strict=True)
    ]


def test_segments_of_other_ranks_are_removed(tmp_path: Path, two: Ranks, three: Ranks) -> None:
    three.run(run, "lanczos", tmp_path, 3, 8)
    assert any(".2.rows" in file.name for file in tmp_path.iterdir())
    two.run(run, "lanczos", tmp_path, 2, 12)
    assert not any(".2.rows" in file.name for file in tmp_path.iterdir())
    assert not any(file.name.endswith(".part") for file in tmp_path.iterdir())


def test_each_rank_writes_its_own_columns(tmp_path: Path, two: Ranks) -> None:
    two.run(run, "slq", tmp_path / "two", 2, 30)
    run("slq", tmp_path / "one", 1, 30)

    def size(folder: Path, end: str = ".rows") -> int:
        return sum(file.stat().st_size for file in folder.glob(f"*{end}"))

    alone = size(tmp_path / "one")
    assert size(tmp_path / "two") < 1.02 * alone
    assert size(tmp_path / "two", ".1.rows") < 0.52 * alone


def test_damage_to_the_part_of_one_rank_is_an_error_on_all(tmp_path: Path, two: Ranks) -> None:
    two.run(run, "lanczos", tmp_path, 2, 8)
    victim = max(tmp_path.glob("*.1.rows"), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    first, second = two.outcomes(run, "lanczos", tmp_path, 2, 20)
    assert second.error is not None
    assert "is damaged, nothing was changed" in second.error
    assert first.error is not None
    assert first.error.startswith("RuntimeError: failed on another rank")
    assert "rank 1: ValueError: checkpoint" in first.error


def run_of_dtensors(
    name: str, path: Path | None, kind: str, ranks: int, most: int
) -> tuple[list[Tensor], int]:
    """What the run found of leaves that are cut, and the products that it made just now."""
    mesh, cuts = dtensors.on_mesh((ranks,), kind)
    plain = dtensors.as_matvec(problems.symmetric(positive=True), mesh, cuts)
    made: list[int] = []

    def matvec(block: dict[str, Tensor]) -> dict[str, Tensor]:
        made.append(len(block["a"]))
        return plain(block)  # type: ignore[no-any-return]

    like = dtensors.cut(problems.like(), mesh, cuts)
    found = problems.ALGORITHMS[name](matvec, like, max_matvecs=most, checkpoint=path, seed=3)
    whole = dtensors.gathered(found)
    values = (
        (whole.vectors, whole.values) if isinstance(found, hf.results.Eigenpairs) else whole.value
    )
    return leaves(values), sum(made)


@pytest.mark.parametrize("name", ["lanczos, restarted", "hutchinson_diagonal"])
@pytest.mark.parametrize("kind", ["last axes", "some of each"])
def test_a_run_of_dtensors_goes_on_as_they_are_cut(
    name: str, kind: str, tmp_path: Path, four: Ranks
) -> None:
    few, most = RUNS[name]
    wanted = four.run(run_of_dtensors, name, None, kind, 4, most)
    four.run(run_of_dtensors, name, tmp_path, kind, 4, few)
    found = four.run(run_of_dtensors, name, tmp_path, kind, 4, most)
    for (again, made), (at_once, of_all) in zip(found, wanted, strict=True):
        assert same(again, at_once, 0.0)
        # One is made again, to see that the matrix is the same.
        assert made < of_all - few // 2


def test_a_run_of_dtensors_on_another_mesh_is_refused(
    tmp_path: Path, two: Ranks, three: Ranks
) -> None:
    three.run(run_of_dtensors, "lanczos", tmp_path, "last axes", 3, 8)
    for outcome in two.outcomes(run_of_dtensors, "lanczos", tmp_path, "last axes", 2, 60):
        assert outcome.error is not None
        assert "the cut of leaves over ranks was [0, 1, 2]: a S(1), b S(0)" in outcome.error
        assert "and is [0, 1]: a S(1), b S(0)" in outcome.error
    with pytest.raises(ValueError, match="the cut of leaves over ranks was .* and is None now"):
        run("lanczos", tmp_path, 1, 60)


def in_a_directory_of_its_own(path: Path, ranks: int, most: int) -> None:
    run("lanczos", path if dist.get_rank() == 0 else path / "elsewhere", ranks, most)


def test_ranks_that_see_different_states_are_told(tmp_path: Path, two: Ranks) -> None:
    two.run(run, "lanczos", tmp_path, 2, 8)
    for outcome in two.outcomes(in_a_directory_of_its_own, tmp_path, 2, 20):
        assert outcome.error is not None
        assert "the ranks disagree on the checkpoint" in outcome.error


def test_a_directory_that_is_not_shared_is_noticed_before_the_first_product(
    tmp_path: Path, two: Ranks
) -> None:
    first, second = two.outcomes(in_a_directory_of_its_own, tmp_path / "new", 2, 8)
    assert second.error is not None
    assert "the ranks do not share this directory" in second.error
    assert first.error is not None
    assert "rank 1: ValueError: checkpoint" in first.error
    assert not list((tmp_path / "new").rglob("*.*"))


def whole_on_each(path: Path) -> None:
    dist.barrier()
    run("lanczos", path, 1, 60, pause=0.02)


def test_ranks_that_hold_whole_vectors_do_not_share_a_directory(tmp_path: Path, two: Ranks) -> None:
    errors = [outcome.error for outcome in two.outcomes(whole_on_each, tmp_path)]
    # One of them has the directory, and the other one is told whose it is.
    (refusal,) = filter(None, errors)
    assert re.search(r"process \d+ on host \S+ is running in this directory", refusal)
    assert "space=sharded(params, mesh)" in refusal


def from_vectors(path: Path, most: int) -> tuple[int, int]:
    like = problems.like()
    matvec, space = problems.as_matvec(problems.symmetric()), hf.sharded(like, problems.mesh(2))
    first = hf.lanczos(matvec, like, k=2, space=space, seed=0)
    products = 0

    def counted(block: Any) -> Any:
        nonlocal products
        products += 1
        return matvec(block)

    again = hf.lanczos(
        *(counted, like),
        k=2, block_size=2, rtol=1e-12, space=space, seed=1, start=first.vectors,
        max_matvecs=most, checkpoint=path,
    )  # fmt: skip
    return products, again.passes


def test_a_start_of_which_each_rank_has_a_part_is_the_same_again(
    tmp_path: Path, two: Ranks
) -> None:
    two.run(from_vectors, tmp_path, 6)
    for products, passes in two.run(from_vectors, tmp_path, 10):
        assert products < passes


def with_options(path: Path | None, options: list[dict[str, Any]]) -> None:
    like = problems.like()
    hf.lanczos(
        problems.as_matvec(problems.symmetric(positive=True)),
        like,
        space=hf.sharded(like, problems.mesh(2)),
        checkpoint=path,
        **({"seed": 3} | options[dist.get_rank()]),
    )


def of_data(path: Path | None, options: list[dict[str, Any]]) -> None:
    """Vectors are whole on each rank, and batches are divided."""
    loss, params = problems.model_and_loss()
    matvec = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2))(params, problems.batches())
    hf.lanczos(
        hf.matvecs.shift(matvec, 0.0), params, **({"seed": 3, "k": 2} | options[dist.get_rank()])
    )


def of_dtensors(path: Path | None, options: list[dict[str, Any]]) -> None:
    mesh, cuts = dtensors.on_mesh((2,), "last axes")
    matvec = dtensors.as_matvec(problems.symmetric(positive=True), mesh, cuts)
    like = dtensors.cut(problems.like(), mesh, cuts)
    hf.lanczos(matvec, like, **({"seed": 3} | options[dist.get_rank()]))


@pytest.mark.parametrize("run_with", [with_options, of_data, of_dtensors])
@pytest.mark.parametrize(
    "options",
    [
        {"k": 3}, {"block_size": 2}, {"which": "LA"}, {"seed": 4}, {"max_matvecs": 9},
        {"rtol": 0.5}, {"search": 0}, {"basis_dtype": torch.bfloat16},
    ],
)  # fmt: skip
def test_options_that_differ_are_named_on_every_rank(
    run_with: Any, options: dict[str, Any], two: Ranks
) -> None:
    (name,) = options
    for outcome in two.outcomes(run_with, None, [{}, options]):
        assert outcome.error is not None
        assert f"ValueError: the ranks disagree on {name}: rank 0 has " in outcome.error
        assert f", rank 1 has {options[name]}; pass the same value" in outcome.error


def test_a_default_that_one_rank_passes_is_the_same(two: Ranks) -> None:
    defaults = {"which": "LM", "block_size": np.int64(1), "k": 6, "rtol": np.float64(1e-4)}
    assert two.run(with_options, None, [{}, defaults]) == [None, None]


@pytest.mark.parametrize("run_with", [with_options, of_data, of_dtensors])
def test_an_option_that_is_wrong_on_one_rank_is_an_error_on_all(run_with: Any, two: Ranks) -> None:
    first, second = two.outcomes(run_with, None, [{}, {"k": "3"}])
    assert second.error is not None
    assert "k must be a whole number" in second.error
    assert first.error is not None
    assert "failed on another rank, so this rank stops: rank 1: TypeError: k must" in first.error
