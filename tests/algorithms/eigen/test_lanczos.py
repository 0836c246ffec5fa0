from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms import offload as streamed
from hessfunc.algorithms.eigen import lanczos, recurrence
from hessfunc.memory import Footprint
from hessfunc.randomness import seeded
from tests.algorithms.far import copies_are_late, counted_copies, every_basis_is_far
from tests.algorithms.spectra import decaying, symmetric

SPECTRUM = torch.cat([torch.linspace(-1, 1, 180), torch.tensor([9.0, -7.0, 5.0, -4.0, 3.0, 2.0])])
VECTOR = torch.zeros(len(SPECTRUM), dtype=torch.float64)


def expected(eigenvalues: Tensor, which: str, k: int) -> Tensor:
    down = eigenvalues.double().sort(descending=True).values
    match which:
        case "LM":
            return down[down.abs().argsort(descending=True, stable=True)][:k]
        case "LA":
            return down[:k]
        case "SA":
            return down.flip(0)[:k]
        case _:
            return torch.cat([down[: k - k // 2], down[len(down) - k // 2 :]])


def measured_residuals(matrix: Tensor, found: hf.results.Eigenpairs) -> Tensor:
    images = found.vectors.double() @ matrix
    return (images - found.values[:, None] * found.vectors.double()).norm(dim=1)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_finds_the_wanted_end(which: str, block_size: int) -> None:
    found = hf.lanczos(
        hf.dense(symmetric(SPECTRUM)), VECTOR, k=5, which=which, block_size=block_size, seed=0
    )
    torch.testing.assert_close(found.values, expected(SPECTRUM, which, 5), rtol=1e-7, atol=1e-7)
    assert found.converged.all()
    assert found.reason.startswith("converged")


def test_vectors_are_orthonormal_eigenvectors() -> None:
    matrix = symmetric(SPECTRUM)
    found = hf.lanczos(hf.dense(matrix), VECTOR, k=6, rtol=1e-8, seed=0)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, torch.eye(6).double())
    assert (measured_residuals(matrix, found) < 1e-7).all()


def test_dominant_pair_of_opposite_sign() -> None:
    spectrum = torch.cat([torch.tensor([3.0, -3.0]), torch.linspace(-1, 1, 98)])
    found = hf.lanczos(hf.dense(symmetric(spectrum)), torch.zeros(100).double(), k=2, seed=0)
    assert found.values.sort().values.tolist() == pytest.approx([-3, 3], abs=1e-7)
    assert found.converged.all()


@pytest.mark.parametrize("factor", [2.0**-27, 2.0**27])
def test_scale_of_the_matrix_does_not_matter(factor: float) -> None:
    matrix = symmetric(SPECTRUM)
    plain = hf.lanczos(hf.dense(matrix), VECTOR, k=4, seed=0)
    scaled = hf.lanczos(hf.dense(matrix * factor), VECTOR, k=4, seed=0)
    torch.testing.assert_close(scaled.values, plain.values * factor, rtol=1e-7, atol=0)
    assert scaled.matvecs == plain.matvecs
    assert scaled.converged.all()


def test_more_pairs_than_the_rank() -> None:
    spectrum = torch.cat([torch.tensor([3.0, 2.0, -1.0]), torch.zeros(97)])
    found = hf.lanczos(hf.dense(symmetric(spectrum)), torch.zeros(100).double(), k=6, seed=0)
    assert found.values.tolist() == pytest.approx([3, 2, -1, 0, 0, 0], abs=1e-12)
    assert found.converged.all()


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_all_values_of_a_small_matrix(which: str) -> None:
    spectrum = torch.tensor([2.0, -1.0, 0.5, 0.0, 4.0])
    found = hf.lanczos(
        hf.dense(symmetric(spectrum)), torch.zeros(5).double(), k=5, which=which, seed=0
    )
    torch.testing.assert_close(found.values, expected(spectrum, which, 5), atol=1e-12, rtol=0)
    assert found.converged.all()


def test_repeated_eigenvalues_of_a_matrix_of_few_distinct_ones() -> None:
    spectrum = torch.tensor([5.0] * 3 + [1.0] * 20)
    found = hf.lanczos(hf.dense(symmetric(spectrum)), torch.zeros(23).double(), k=4, seed=0)
    assert found.values.tolist() == pytest.approx([5, 5, 5, 1])


def test_zero_matrix() -> None:
    found = hf.lanczos(hf.dense(torch.zeros(6, 6)), torch.zeros(6), k=2, seed=0)
    assert found.values.tolist() == [0, 0]
    assert found.converged.all()


@pytest.mark.parametrize("rtol", [0.3, 0.1, 1e-2, 1e-6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reported_residuals_are_the_measured_ones(rtol: float, seed: int) -> None:
    matrix = symmetric(SPECTRUM)
    found = hf.lanczos(hf.dense(matrix), VECTOR, k=4, rtol=rtol, seed=seed)
    torch.testing.assert_close(
        found.residuals, measured_residuals(matrix, found), rtol=1e-6, atol=1e-12
    )
    assert (found.residuals <= rtol * found.values.abs() + 1e-11).equal(found.converged)


# A single vector finds one copy of a clustered value, and warns.
@pytest.mark.filterwarnings("ignore:converged.*outside of the basis")
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31),
    budget=st.integers(8, 60),
    which=st.sampled_from(["LM", "LA", "SA", "BE"]),
    clustered=st.booleans(),
)
def test_every_interval_holds_an_eigenvalue_at_any_budget(
    seed: int, budget: int, which: str, clustered: bool
) -> None:
    spectrum = torch.randn(60, generator=torch.Generator().manual_seed(seed)).double()
    if clustered:
        spectrum = spectrum.round(decimals=1)
    matrix = symmetric(spectrum, seed=seed % 7)
    found = hf.lanczos(
        hf.dense(matrix),
        torch.zeros(60).double(),
        k=4,
        which=which,
        max_matvecs=budget,
        rtol=1e-8,
        seed=seed,
    )
    low, high = found.intervals.mT[..., None]
    assert ((low <= spectrum) & (spectrum <= high)).any(1).all()
    actual = measured_residuals(matrix, found)
    assert (actual[found.converged] <= 1e-8 * found.values.abs()[found.converged] + 1e-12).all()
    assert found.matvecs <= budget


def test_too_small_a_budget_is_said() -> None:
    found = hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, k=6, max_matvecs=14, seed=0)
    assert "budget" in found.reason
    assert not found.converged.all()
    assert found.matvecs <= 14


def test_rounding_that_hides_the_tolerance_is_said() -> None:
    matrix = symmetric(SPECTRUM).float()
    found = hf.lanczos(hf.dense(matrix), VECTOR.float(), k=4, rtol=1e-12, seed=0)
    residuals = measured_residuals(matrix.double(), found)
    assert (residuals < 1e-4).all()
    torch.testing.assert_close(found.residuals, residuals, atol=1e-5, rtol=1e-2)


def test_float32_values_are_as_good_as_float32_products() -> None:
    found = hf.lanczos(hf.dense(symmetric(SPECTRUM).float()), VECTOR.float(), k=5, seed=0)
    torch.testing.assert_close(
        found.values, expected(SPECTRUM, "LM", 5), rtol=2e-6, atol=0, check_dtype=False
    )
    assert found.vectors.dtype == torch.float32


def test_a_bfloat16_basis_has_honest_residuals_and_takes_half_of_the_memory() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 50_000), torch.tensor([9.0, -7.0, 5.0])])
    like = torch.zeros(len(spectrum))
    rotation = hf.random_like(like, 1, kind="normal", seed=7)[0]
    rotation /= rotation.norm()

    def matvec(block: Tensor) -> Tensor:
        # Between two reflections, for eigenvectors that have all entries.
        block = block - 2 * (block @ rotation)[:, None] * rotation
        block = block * spectrum
        return block - 2 * (block @ rotation)[:, None] * rotation

    peaks = []
    for dtype in (torch.bfloat16, torch.float32):
        with Footprint() as memory:
            found = hf.lanczos(
                matvec, like, k=3, basis_size=60, rtol=1e-2, basis_dtype=dtype, seed=0
            )
        peaks.append(memory.peak)
        assert found.converged.all()
        assert found.vectors.dtype == torch.float32
        assert found.values.tolist() == pytest.approx([9, -7, 5], rel=2e-3)
        rows = found.vectors
        measured = (matvec(rows) - found.values[:, None].float() * rows).norm(dim=1).double()
        assert bool((found.residuals >= 0.99 * measured).all())
    assert peaks[1] - peaks[0] == pytest.approx(61 * len(spectrum) * 2, rel=0.05)


@pytest.mark.parametrize("rtol", [1e-4, 1e-2, 0.1])
def test_a_bfloat16_basis_converges_to_its_rounding_alone(rtol: float) -> None:
    matrix = symmetric(SPECTRUM)
    for seed in range(5):
        found = hf.lanczos(
            hf.dense(matrix.float()),
            VECTOR.float(),
            k=4,
            rtol=rtol,
            basis_dtype=torch.bfloat16,
            seed=seed,
        )
        residuals = measured_residuals(matrix, found)
        assert bool((found.residuals >= 0.99 * residuals).all())
        within = found.residuals <= rtol * found.values.abs()
        assert torch.equal(found.converged, within)
        assert bool(found.converged.all()) or rtol < 0.1
        assert ("cannot reach" in found.reason) == (not found.converged.all())


@pytest.mark.parametrize("block_size", [1, 2])
def test_results_that_a_callback_keeps_stay_as_they_were(block_size: int) -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    found = hf.lanczos(
        hf.dense(symmetric(SPECTRUM)),
        VECTOR,
        k=3,
        basis_size=8,
        block_size=block_size,
        rtol=1e-8,
        callback=lambda running: kept.append((running.vectors, running.vectors.clone())),
        seed=0,
    )
    assert found.matvecs > 2 * 8
    assert all(torch.equal(now, then) for now, then in kept)


def test_the_basis_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces: set[int] = set()
    real = lanczos.block_step

    def watched(*arguments: Any) -> Any:
        state = real(*arguments)
        workspaces.add(state.basis.rows.data_ptr())
        return state

    monkeypatch.setattr(lanczos, "block_step", watched)
    found = hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, k=3, basis_size=8, seed=0)
    assert found.matvecs > 2 * 8
    assert len(workspaces) == 1


def test_warm_start_takes_fewer_products() -> None:
    matrix = symmetric(SPECTRUM)
    cold = hf.lanczos(hf.dense(matrix), VECTOR, k=2, seed=0)
    nudged = matrix + 1e-4 * symmetric(torch.randn(len(SPECTRUM)), seed=3)
    warm = hf.lanczos(hf.dense(nudged), VECTOR, k=2, start=cold.vectors, seed=0)
    assert warm.matvecs < cold.matvecs
    assert warm.converged.all()


def test_same_seed_same_bits_and_no_seed_is_recorded() -> None:
    matvec = hf.dense(symmetric(SPECTRUM))
    first = hf.lanczos(matvec, VECTOR, k=3)
    again = hf.lanczos(matvec, VECTOR, k=3, seed=first.seed)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.vectors, again.vectors)


def test_random_stream_of_torch_is_not_touched() -> None:
    before = torch.random.get_rng_state()
    hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, k=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_callback_sees_progress_and_stops() -> None:
    seen: list[int] = []

    def callback(running: hf.results.Eigenpairs) -> bool:
        seen.append(running.matvecs)
        return len(seen) == 2

    found = hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, k=3, callback=callback, seed=0)
    assert seen == sorted(seen)
    assert len(seen) == 2
    assert "callback" in found.reason


def test_trees_of_several_leaves() -> None:
    matrix = symmetric(torch.arange(1.0, 13.0))
    like = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(6).double()}
    found = hf.lanczos(hf.dense(matrix), like, k=2, seed=0)
    assert found.vectors["a"].shape == (2, 2, 3)
    assert found.values.tolist() == pytest.approx([12, 11])


def test_asymmetric_matvec_is_refused() -> None:
    matrix = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(ValueError, match="not symmetric or not deterministic"):
        hf.lanczos(lambda block: block @ matrix, torch.zeros(30).double(), k=2, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 200}, "k=200: the matrix has 186 eigenvalues"),
        ({"k": 0}, "k=0"),
        ({"rtol": -1e-3}, "rtol=-0.001: it must be at least 0"),
        ({"atol": -1.0}, "atol=-1.0"),
        ({"which": "SM"}, "which='SM': choose"),
        ({"block_size": 0}, "block_size=0"),
        ({"basis_dtype": torch.float16}, "basis_dtype=torch.float16: choose torch.bfloat16"),
        ({"basis_bytes": -10}, "basis_bytes=-10: it must be at least 1"),
        ({"start": torch.full((len(SPECTRUM),), torch.nan).double()}, "NaN or infinite"),
        ({"basis_size": 3}, "basis_size=3: it must be at least 8"),
        ({"max_matvecs": 5}, "max_matvecs=5: it must be at least 7"),
        ({"start": VECTOR}, "start has a vector of zeros"),
        ({"start": torch.ones(3)}, "shape"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, **options)


def test_float32_says_what_its_rounding_hides() -> None:
    eigenvalues = torch.cat([torch.linspace(0.5, 1, 498), torch.tensor([2e4, 1.5e4])])
    basis = symmetric(torch.arange(500.0))
    matrix = torch.linalg.eigh(basis).eigenvectors
    matrix = ((matrix * eigenvalues.double()) @ matrix.mT).float()
    matvec = hf.dense((matrix + matrix.mT) / 2)
    found = hf.lanczos(matvec, torch.zeros(500), k=2, which="SA", basis_size=60, seed=0)
    assert not found.converged.any()
    assert "rounded" in found.reason
    low, high = found.intervals.mT[..., None]
    assert ((low <= eigenvalues) & (eigenvalues <= high)).any(1).all()


def test_the_small_end_of_a_float32_matrix_is_found() -> None:
    eigenvalues = torch.cat([torch.tensor([2000.0, 1500.0]), torch.linspace(0, 1, 996)])
    eigenvalues = torch.cat([eigenvalues, torch.tensor([-0.05, -0.04])])
    found = hf.lanczos(
        lambda v: eigenvalues * v, torch.zeros(1000), k=2, which="SA", rtol=1e-2, seed=0
    )
    assert found.converged.all()
    assert found.values.tolist() == pytest.approx([-0.05, -0.04], rel=1e-3)


def test_intervals_of_the_small_end_are_as_wide_as_rounding() -> None:
    for seed in range(40):
        matrix = symmetric(torch.tensor([3.1, 0, 0, 0, 0]), seed).float()
        exact = torch.linalg.eigvalsh(matrix.double())
        found = hf.lanczos(
            hf.dense(matrix), torch.zeros(5), k=4, which="SA", block_size=5, seed=seed
        )
        low, high = found.intervals.mT[..., None]
        assert ((low <= exact) & (exact <= high)).any(1).all()


def test_bfloat16_parameters(tmp_path: Path) -> None:
    matrix = symmetric(SPECTRUM).bfloat16()

    def matvec(block: Tensor) -> Tensor:
        return (block.float() @ matrix.float()).bfloat16()

    found = hf.lanczos(matvec, VECTOR.bfloat16(), k=2, rtol=0.1, seed=0)
    assert found.values.tolist() == pytest.approx([9, -7], rel=0.02)
    found.save(tmp_path / "pairs.npz")
    assert hf.load(tmp_path / "pairs.npz").vectors.dtype == torch.float32


def softmax_regression() -> tuple[hf.trees.Matvec, Tensor, Tensor]:
    """The Hessian at zero weights: each eigenvalue stands there four times, 40 are zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, dtype=torch.float64, generator=generator) * torch.linspace(1, 3, 40)
    weight = torch.zeros(40, 5, dtype=torch.float64)
    loss = hf.supervised(lambda params, x: x @ params, torch.nn.functional.cross_entropy)
    labels = torch.randint(5, (300,), generator=generator)
    matvec = hf.hvp(loss)(weight, (x.double(), labels))
    distinct = torch.linalg.eigvalsh(x.double().mT @ x.double() / 300).flip(0) / 5
    return matvec, weight, distinct.repeat_interleave(4)


def test_blocks_find_repeated_eigenvalues_whole() -> None:
    matvec, like, expected = softmax_regression()
    found = hf.lanczos(matvec, like, k=12, block_size=4, rtol=1e-6, seed=0)
    torch.testing.assert_close(found.values, expected[:12], rtol=1e-8, atol=0)
    assert found.reason == "converged: all residuals are within the tolerance"


@pytest.mark.parametrize("seed", range(5))
def test_a_single_vector_warns_of_repeated_eigenvalues(seed: int) -> None:
    matvec, like, expected = softmax_regression()
    with pytest.warns(UserWarning, match="repeated eigenvalues were missed, take block_size=4"):
        found = hf.lanczos(matvec, like, k=6, seed=seed)
    assert "outside of the basis" in found.reason
    assert not torch.allclose(found.values, expected[:6], rtol=1e-3)


def test_simple_eigenvalues_do_not_warn() -> None:
    for seed in range(20):
        hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, k=5, which="BE", seed=seed)


def test_memory_chooses_the_size_of_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    matvec, vector = hf.dense(symmetric(SPECTRUM)), len(SPECTRUM) * 8
    sizes: list[int] = []

    def counted(block: Tensor) -> Tensor:
        sizes.append(len(block))
        return matvec(block)

    small = hf.lanczos(counted, VECTOR, k=3, basis_bytes=(6 + 1 + 3) * vector, seed=0)
    large = hf.lanczos(matvec, VECTOR, k=3, seed=0)
    torch.testing.assert_close(small.values, large.values)
    assert small.matvecs > large.matvecs
    with pytest.raises(MemoryError, match="a basis of 5 vectors of 186 entries .*fewer pairs"):
        hf.lanczos(matvec, VECTOR, k=3, basis_bytes=(4 + 1 + 3) * vector, seed=0)
    monkeypatch.setattr(recurrence, "available_to", lambda *_: 0)
    with pytest.raises(MemoryError, match="take fewer pairs"):
        hf.lanczos(matvec, VECTOR, k=3, seed=0)


def test_the_basis_never_exceeds_its_limit() -> None:
    states: list[int] = []
    vector = len(SPECTRUM) * 8
    real = lanczos.block_step

    def watched(*arguments: object) -> object:
        state = real(*arguments)
        states.append(len(state.basis))
        return state

    lanczos.block_step = watched
    try:
        hf.lanczos(
            hf.dense(symmetric(SPECTRUM)), VECTOR, k=3, basis_bytes=(8 + 1 + 3) * vector, seed=0
        )
    finally:
        lanczos.block_step = real
    assert max(states) <= 8 + 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", decaying(1000))
@pytest.mark.filterwarnings("ignore:converged.*outside of the basis")
def test_intervals_are_never_without_an_eigenvalue(name: str, dtype: torch.dtype) -> None:
    values = decaying(1000)[name]
    spectrum, like = values.to(dtype), torch.zeros(1000, dtype=dtype)
    exact = spectrum.double()
    for seed in range(84):
        which = ("LM", "LA", "SA", "BE")[seed % 4]
        found = hf.lanczos(
            lambda v: v * spectrum,
            like,
            k=1 + seed % 5,
            which=which,
            block_size=1 + seed % 3,
            rtol=10.0 ** -(2 + seed % 4),
            max_matvecs=30 + seed,
            seed=seed,
        )
        distance = (found.values[:, None] - exact).abs().amin(1)
        radius = (found.intervals[:, 1] - found.intervals[:, 0]) / 2
        assert bool((distance <= radius).all())


def test_a_basis_of_300_float32_vectors_is_orthonormal() -> None:
    n = 3000
    spectrum = torch.cat([0.9 ** torch.arange(100.0) * 100, torch.linspace(-1, 1, n - 100)])
    found = hf.lanczos(
        lambda v: v * spectrum, torch.zeros(n), k=300, basis_size=310, max_matvecs=620, seed=0
    )
    gram = found.vectors.double() @ found.vectors.double().mT
    assert float((gram - torch.eye(300)).abs().max()) < 1e-5


# Of 298 copies of zero not all four that are wanted need be met, and then the run warns.
@pytest.mark.filterwarnings("ignore:converged.*outside of the basis")
@pytest.mark.parametrize("seed", range(10))
def test_a_restart_that_keeps_zeros_alone_remembers_the_scale(seed: int) -> None:
    spectrum = torch.cat([torch.tensor([1000.0, 500.0]), torch.zeros(298)])
    matrix = symmetric(spectrum)
    like, options = torch.zeros(300).double(), {"which": "SA", "block_size": 2, "basis_size": 8}
    found = hf.lanczos(hf.dense(matrix), like, k=4, seed=seed, **options)
    assert found.largest == pytest.approx(1000, rel=0.1)
    assert bool((found.values[:2].abs() < 1e-9).all())


def test_a_search_is_not_made_where_it_is_not_asked_for() -> None:
    A = torch.linspace(0, 6, 200, dtype=torch.float64).diag()
    A[0, 0] = A[1, 1] = 9.0
    like, start = torch.zeros(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
    # Two equal entries of the start hide one copy of 9 from its Krylov space.
    searched = hf.lanczos(hf.dense(A), like, k=2, start=start, seed=0)
    alone = hf.lanczos(hf.dense(A), like, k=2, start=start, seed=0, search=0)
    assert searched.values.tolist() == pytest.approx([9, 9])
    assert alone.values.tolist() == pytest.approx([9, 6], rel=0.01)
    assert alone.matvecs < searched.matvecs
    assert alone.reason == "converged: all residuals are within the tolerance"


BULK = torch.linspace(-0.1, 0.1, 198, dtype=torch.float64)


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize(
    ("which", "top", "right"),
    [
        ("LA", [4.9, 5.6], [5.6]),
        ("LM", [4.9, -5.6], [-5.6]),
        ("SA", [-4.9, -5.6], [-5.6]),
        ("LA", [4.9, 5.0], [5.0]),
        ("LA", [0.2, 0.25], [0.25]),
        ("BE", [3.0, 3.5], [3.5, -0.1]),
        ("LA", [4.9, 4.9], [4.9]),
    ],
)
def test_a_start_in_an_invariant_subspace_is_not_trusted(
    which: str, top: list[float], right: list[float], block_size: int
) -> None:
    spectrum = torch.cat([torch.tensor(top, dtype=torch.float64), BULK])
    like, start = torch.zeros(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    start[0] = 1
    options: dict[str, Any] = {"k": len(right), "which": which, "block_size": block_size}
    for seed in range(4):
        found = hf.lanczos(
            lambda v: v * spectrum, like, start=start, rtol=1e-3, seed=seed, **options
        )
        assert found.values.tolist() == pytest.approx(right, rel=1e-3)
        assert found.converged.all()
        assert found.reason.startswith("converged")


def test_a_start_in_one_block_of_a_matrix_finds_the_other_block() -> None:
    first, second = symmetric(torch.linspace(0, 3, 50)), symmetric(torch.linspace(0, 9, 50))
    matrix = torch.block_diag(first, second)
    start = torch.cat([torch.randn(50), torch.zeros(50)]).double()
    found = hf.lanczos(
        hf.dense(matrix), torch.zeros(100).double(), k=2, which="LA", start=start, seed=0
    )
    assert found.values.tolist() == pytest.approx([9, 9 - 9 / 49])


def test_a_budget_that_is_too_small_to_trust_a_start_is_said() -> None:
    spectrum = torch.cat([torch.tensor([0.2, 0.25], dtype=torch.float64), BULK])
    start = torch.eye(200, dtype=torch.float64)[0]
    with pytest.warns(UserWarning, match="no wanted eigenvalue lies outside of the Krylov space"):
        found = hf.lanczos(
            lambda v: v * spectrum, torch.zeros_like(start), k=1, start=start, max_matvecs=4, seed=0
        )
    assert not found.reason.startswith("converged")


@pytest.mark.parametrize("k", [1, 3])
def test_rounding_of_products_is_measured_and_left_room_for(k: int) -> None:
    # Products in 8 bits of vectors in float32, which do not tell.
    matrix = symmetric(torch.cat([torch.linspace(-1, 1, 97), torch.tensor([9.0, 8.0, 7.0])]))
    low = matrix.bfloat16()

    def matvec(block: Tensor) -> Tensor:
        return (block.bfloat16() @ low).float()

    like = torch.zeros(100)
    for seed in range(10):
        options: dict[str, Any] = {"k": k, "which": "LA", "max_matvecs": 100, "seed": seed}
        found = hf.lanczos(matvec, like, rtol=0.02, **options)
        assert found.converged.all()
        images = matvec(found.vectors).double()
        residuals = (images - found.values[:, None] * found.vectors.double()).norm(dim=1)
        assert bool((residuals <= 0.02 * found.values.abs()).all())
        hidden = hf.lanczos(matvec, like, rtol=1e-4, **options)
        assert not hidden.converged.any()
        quoted = re.search(r"rounded to (\S+) \|A\|", hidden.reason)
        assert quoted
        assert 5e-4 < float(quoted[1]) < 1e-2


def test_copies_are_found_or_missed_aloud_where_the_basis_nearly_fills_the_space() -> None:
    # The cluster at zero ends the run after 12 or 13 vectors, before 15 span an invariant space.
    cluster = torch.linspace(-1e-3, 1e-3, 5)
    spectrum = torch.cat([torch.full((3,), 5.0), torch.linspace(1, 4, 9), cluster]).double()
    like = torch.zeros(17).double()
    options: dict[str, Any] = {"k": 10, "which": "LA", "rtol": 1e-2}
    for seed in range(10):
        # Two copies have no part in the start: zeros stay zero, however sums are rounded.
        start = hf.random_like(like, 1, kind="normal", seed=seed)[0]
        start[1:3] = 0.0
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = hf.lanczos(lambda v: v * spectrum, like, start=start, seed=seed, **options)
        copies = int((found.values > 4.9).sum())
        assert copies == 3 or "outside of the" in str(said[0].message)


def test_bytes_lower_a_given_basis_size() -> None:
    matvec, vector = hf.dense(symmetric(SPECTRUM)), len(SPECTRUM) * 8
    given = hf.lanczos(matvec, VECTOR, k=3, basis_size=8, seed=0)
    lowered = hf.lanczos(
        matvec, VECTOR, k=3, basis_size=80, basis_bytes=(8 + 1 + 3) * vector, seed=0
    )
    assert lowered.matvecs == given.matvecs


def test_a_bfloat16_matrix_of_low_rank() -> None:
    exact = torch.tensor([400.0, 200, 100, 50, 25]).double()
    matrix = symmetric(torch.cat([exact, torch.zeros(295)])).float()
    like = torch.zeros(300, dtype=torch.bfloat16)
    found = hf.lanczos(lambda v: (v.float() @ matrix).bfloat16(), like, k=3, rtol=5e-2, seed=0)
    exact = exact[:3]
    torch.testing.assert_close(found.values, exact, rtol=2e-2, atol=0)


RUNS: dict[str, dict[str, Any]] = {
    "one vector": {"k": 5},
    "blocks": {"k": 4, "block_size": 3, "which": "BE"},
    "restarts": {"k": 3, "basis_size": 8, "rtol": 1e-8},
    "restarts of blocks": {"k": 3, "block_size": 2, "basis_size": 11, "rtol": 1e-8},
    "restarts within a round": {"k": 9, "basis_size": 41},
    "to its end": {"k": 186},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_basis_from_afar_gives_the_same_pairs(name: str) -> None:
    matvec, options = hf.dense(symmetric(SPECTRUM)), RUNS[name]
    expected = hf.lanczos(matvec, VECTOR, seed=0, **options)
    with every_basis_is_far(), counted_copies() as copies:
        found = hf.lanczos(matvec, VECTOR, seed=0, **options)
    assert copies
    # Pieces are added up in another order, which may move the last round by one.
    assert found.matvecs == pytest.approx(expected.matvecs, rel=0.15)
    assert found.reason == expected.reason
    # Of two values of one size either may come first.
    for mine, his in ((found.values, expected.values), (found.residuals, expected.residuals)):
        torch.testing.assert_close(mine.sort()[0], his.sort()[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["one vector", "blocks", "restarts of blocks", "restarts within a round"]
)
def test_copies_that_come_late_are_waited_for(name: str, tmp_path: Path) -> None:
    matvec, options = hf.dense(symmetric(SPECTRUM)), RUNS[name] | {"seed": 0}
    with every_basis_is_far():
        expected = hf.lanczos(matvec, VECTOR, **options)
        with copies_are_late():
            found = hf.lanczos(matvec, VECTOR, **options)
            hf.lanczos(
                matvec, VECTOR, checkpoint=tmp_path, callback=lambda running: True, **options
            )
        again = hf.lanczos(matvec, VECTOR, checkpoint=tmp_path, **options)
    assert torch.equal(found.vectors, expected.vectors)
    assert torch.equal(found.residuals, expected.residuals)
    # From a state that was stored in the middle.
    assert torch.equal(again.vectors, expected.vectors)


def test_a_bfloat16_basis_from_afar_has_honest_residuals() -> None:
    matrix = symmetric(SPECTRUM)
    options = {"k": 3, "rtol": 1e-2, "basis_dtype": torch.bfloat16, "basis_size": 12}
    with every_basis_is_far():
        found = hf.lanczos(hf.dense(matrix.float()), VECTOR.float(), seed=0, **options)
    assert bool((found.residuals >= 0.99 * measured_residuals(matrix, found)).all())
    assert found.converged.all()


def test_a_step_brings_the_basis_twice_and_no_more_than_two_pieces() -> None:
    n, m, piece = 20_000, 50, 10 * 20_000 * 4
    spectrum, like = torch.linspace(-1, 1, n), torch.zeros(n)
    options = {"k": 1, "basis_size": m + 1, "max_matvecs": m + 1, "rtol": 0.0, "seed": 0}
    peaks = []
    for far in (False, True):
        where = every_basis_is_far(piece) if far else nullcontext()
        with where, counted_copies() as copies, Footprint() as memory:
            hf.lanczos(lambda block: block * spectrum, like, **options)
        peaks.append(memory.peak)
    # A look at the pairs reads it once more, which is seldom.
    twice = 2 * sum(range(1, m + 1)) * n * 4
    assert twice < sum(copies) < 1.1 * twice
    # The inner products of a few rows are made of copies in float64.
    assert peaks[1] - peaks[0] <= 2 * piece + 5 * n * 8


def test_a_basis_that_is_kept_where_the_vectors_are_is_not_copied() -> None:
    matvec = hf.dense(symmetric(SPECTRUM))
    expected = hf.lanczos(matvec, VECTOR, k=3, seed=0)
    with counted_copies() as copies:
        found = hf.lanczos(matvec, VECTOR, k=3, basis_device="cpu", seed=0)
    assert not copies
    assert torch.equal(found.vectors, expected.vectors)


def test_bytes_of_a_basis_from_afar_are_those_of_the_basis_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matvec, vector = hf.dense(symmetric(SPECTRUM)), len(SPECTRUM) * 8
    given = hf.lanczos(matvec, VECTOR, k=3, basis_size=8, seed=0)
    with every_basis_is_far(piece=vector):
        lowered = hf.lanczos(
            matvec, VECTOR, k=3, basis_size=80, basis_bytes=(8 + 1) * vector, seed=0
        )
        assert lowered.matvecs == given.matvecs
        with pytest.raises(MemoryError, match="a basis of 5 vectors .*may be used"):
            hf.lanczos(matvec, VECTOR, k=3, basis_bytes=(4 + 1) * vector, seed=0)
        # Two pieces, a block and three pairs.
        monkeypatch.setattr(streamed, "available_to", lambda _: 2 * (2 + 1 + 3) * vector)
        hf.lanczos(matvec, VECTOR, k=3, seed=0)
        with pytest.raises(MemoryError, match="two pieces of a basis that is kept elsewhere"):
            hf.lanczos(matvec, VECTOR, k=4, seed=0)


def reflected(n: int, device: str) -> tuple[hf.trees.Matvec, Tensor]:
    """A matrix of known spectrum whose eigenvectors have all entries, and a vector."""
    like = torch.zeros(n, dtype=torch.float64, device=device)
    spectrum = torch.linspace(-1, 1, n, dtype=torch.float64, device=device)
    spectrum[:5] = torch.tensor([9.0, -7.0, 5.0, -4.0, 3.0])
    axis = hf.random_like(like, 1, kind="normal", seed=7)[0]
    axis /= axis.norm()

    def matvec(block: Tensor) -> Tensor:
        block = block - 2 * (block @ axis)[:, None] * axis
        block = block * spectrum
        return block - 2 * (block @ axis)[:, None] * axis

    return matvec, like


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_basis_of_a_gpu_in_the_memory_of_the_host(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m, piece = 2**20, 60, 2**23
    monkeypatch.setattr(streamed, "_PIECE", piece)
    matvec, like = reflected(n, "cuda")
    rtol = 1e-12 if dtype == torch.float64 else 1e-2
    options = {"k": 5, "rtol": rtol, "basis_dtype": dtype, "max_matvecs": 150, "seed": 0}
    found, peaks = [], []
    for device in (None, "cpu"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(hf.lanczos(matvec, like, basis_size=m, basis_device=device, **options))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    on_gpu, on_host = found
    error = 1e-10 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(on_host.values, on_gpu.values, rtol=error, atol=0)
    assert on_host.vectors.is_cuda
    # Two pieces, and the copy of one in float32.
    assert peaks[0] - peaks[1] > 0.8 * (m * n * dtype.itemsize - 4 * piece)


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [(None, "cpu"), ("cpu", "cpu"), ("cpu", None)])
@pytest.mark.parametrize("stop", [2, 30])
def test_a_run_goes_on_with_the_basis_elsewhere(
    devices: tuple[str | None, str | None], stop: int, tmp_path: Path
) -> None:
    matvec, like = reflected(2**16, "cuda")
    options = {"k": 5, "basis_size": 20, "rtol": 1e-11, "seed": 0}
    expected = hf.lanczos(matvec, like, **options)
    for device, rounds in zip(devices, (stop, 1000), strict=True):
        seen: list[int] = []

        def stopped(
            running: hf.results.Eigenpairs, seen: list[int] = seen, rounds: int = rounds
        ) -> bool:
            seen.append(running.matvecs)
            return len(seen) == rounds

        found = hf.lanczos(
            matvec, like, basis_device=device, checkpoint=tmp_path, callback=stopped, **options
        )
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=0)


@pytest.mark.parametrize("block_size", [1, 3])
def test_pairs_are_checked_in_blocks(block_size: int) -> None:
    matrix, lengths = symmetric(SPECTRUM).float(), list[int]()

    def matvec(block: Tensor) -> Tensor:
        lengths.append(len(block))
        return block @ matrix

    found = hf.lanczos(
        matvec,
        VECTOR.float(),
        k=5,
        block_size=block_size,
        basis_dtype=torch.bfloat16,
        rtol=1e-2,
        search=0,
        seed=0,
    )
    assert lengths[-3:] == ([1, 3, 2] if block_size > 1 else [1, 1, 1])
    assert max(lengths) == block_size
    rows = found.vectors
    residuals = torch.linalg.vector_norm(
        rows @ matrix - found.values.to(rows)[:, None] * rows, dim=1
    )
    torch.testing.assert_close(found.residuals.float(), residuals, rtol=1e-3, atol=1e-5)


def test_a_model_that_computes_in_bfloat16() -> None:
    with seeded(0):
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3)
        )
        batch = torch.randn(50, 20), torch.randint(3, (50,))
    model_fn, params = hf.functional(model, dtype=torch.bfloat16)
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    exact_fn, exact = hf.functional(model.double())
    wide = hf.supervised(exact_fn, torch.nn.functional.cross_entropy)
    expected = hf.lanczos(hf.hvp(wide)(exact, (batch[0].double(), batch[1])), exact, k=2, seed=0)
    for seed in range(5):
        found = hf.lanczos(hf.hvp(loss)(params, batch), params, k=2, rtol=0.02, seed=seed)
        torch.testing.assert_close(found.values, expected.values, rtol=0.03, atol=0)
    with pytest.raises(ValueError, match="low precision"):
        hf.lanczos(hf.hvp(loss)(params, batch), params, k=2, rtol=1e-4, seed=0)
