from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hessfunc as hf
from hessfunc.randomness import seeded
from tests.reference.spectra import SPECTRUM, VECTOR, decaying, measured_residuals, symmetric


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
    with pytest.raises(ValueError, match="not symmetric, not linear or not deterministic"):
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", decaying(400))
@pytest.mark.filterwarnings("ignore:converged.*outside of the basis")
def test_intervals_are_never_without_an_eigenvalue(name: str, dtype: torch.dtype) -> None:
    values = decaying(400)[name]
    spectrum, like = values.to(dtype), torch.zeros(400, dtype=dtype)
    exact = spectrum.double()
    for seed in range(20):
        which = ("LM", "LA", "SA", "BE")[seed % 4]
        found = hf.lanczos(
            lambda v: v * spectrum,
            like,
            k=1 + seed % 5,
            which=which,
            block_size=1 + seed % 3,
            rtol=10.0 ** -(2 + seed % 4),
            max_matvecs=30 + 3 * seed,
            seed=seed,
        )
        distance = (found.values[:, None] - exact).abs().amin(1)
        radius = (found.intervals[:, 1] - found.intervals[:, 0]) / 2
        assert bool((distance <= radius).all())


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


def test_a_bfloat16_matrix_of_low_rank() -> None:
    exact = torch.tensor([400.0, 200, 100, 50, 25]).double()
    matrix = symmetric(torch.cat([exact, torch.zeros(295)])).float()
    like = torch.zeros(300, dtype=torch.bfloat16)
    found = hf.lanczos(lambda v: (v.float() @ matrix).bfloat16(), like, k=3, rtol=5e-2, seed=0)
    exact = exact[:3]
    torch.testing.assert_close(found.values, exact, rtol=2e-2, atol=0)


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


def test_no_product_checks_pairs_whose_rounding_is_known() -> None:
    matrix, blocks = symmetric(SPECTRUM), list[Tensor]()

    def matvec(block: Tensor) -> Tensor:
        blocks.append(block.clone())
        return block @ matrix

    found = hf.lanczos(matvec, VECTOR, k=4, search=0, seed=0)
    assert found.converged.all()
    # All products are with vectors of one orthonormal basis, up to their lengths.
    rows = torch.nn.functional.normalize(torch.cat(blocks))
    rows *= torch.where(torch.arange(len(rows)) % 2 == 0, 1.0, -1.0)[:, None]
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)).double())
    residuals = measured_residuals(matrix, found)
    assert bool((found.residuals >= residuals - 1e-14).all())


@pytest.mark.parametrize("n", [100, 5000])
@pytest.mark.parametrize("coarse", ["vectors", "products"])
def test_rounding_that_the_dtype_hides_does_not_hide_from_the_inner_products(
    n: int, coarse: str
) -> None:
    values = torch.cat([torch.tensor([9.0, 8.0, 7.0, -6.0]), torch.linspace(-1, 1, n - 4)])
    axis = hf.random_like(torch.zeros(n), 1, kind="normal", seed=7)[0]
    axis /= axis.norm()

    def reflected(block: Tensor) -> Tensor:
        return block - 2 * (block @ axis)[:, None] * axis

    def matvec(block: Tensor) -> Tensor:
        block = block.bfloat16().float() if coarse == "vectors" else block
        product = reflected(reflected(block) * values)
        return product.bfloat16().float() if coarse == "products" else product

    for seed in range(5):
        found = hf.lanczos(matvec, torch.zeros(n), k=3, rtol=0.02, seed=seed)
        rows = found.vectors
        residuals = (matvec(rows) - found.values[:, None].float() * rows).norm(dim=1).double()
        assert bool((found.residuals >= 0.99 * residuals).all())
        assert bool(
            (residuals[found.converged] <= 0.02 * found.values.abs()[found.converged]).all()
        )
