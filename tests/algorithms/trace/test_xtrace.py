from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.sketch import Sketch, SketchedProbes
from hessfunc.algorithms.trace import xtrace
from hessfunc.spaces.of import space_of
from tests.reference.spectra import decaying, symmetric

N = 300
INDEX = torch.arange(1.0, N + 1).double()
SPECTRA = {
    "flat": torch.linspace(1, 3, N).double(),
    "polynomial": INDEX**-2,
    "exponential": 0.9**INDEX,
    "step": torch.where(INDEX <= 30, 1.0, 1e-3).double(),
    "indefinite": 0.9**INDEX * torch.where(INDEX % 3 == 0, -1.0, 1.0),
}
LIKE = {"a": torch.zeros(10, 10).double(), "b": torch.zeros(N - 100).double()}


def test_needs_far_fewer_products_than_hutchinson() -> None:
    matvec = hf.dense(symmetric(SPECTRA["exponential"]))
    ours = hf.xtrace(matvec, LIKE, rtol=0.02, max_matvecs=300, seed=0)
    plain = hf.hutchinson(matvec, LIKE, kind="signs", rtol=0.02, max_matvecs=5000, seed=0)
    assert ours.reason.startswith("converged")
    assert ours.matvecs < plain.matvecs / 5


@pytest.mark.parametrize("rank", [1, 7, 15])
def test_exact_from_one_probe_more_than_the_rank(rank: int) -> None:
    spectrum = torch.where(rank >= INDEX, INDEX, 0.0)
    matvec = hf.dense(symmetric(spectrum))
    found = hf.xtrace(matvec, LIKE, max_matvecs=2 * (rank + 1), block_size=4, seed=0)
    assert found.value == pytest.approx(float(spectrum.sum()), rel=1e-10)
    low, high = found.interval()
    assert low <= float(spectrum.sum()) <= high
    assert high - low < 1e-8


def test_parts_of_leaves_sum_to_the_value() -> None:
    matrix = symmetric(SPECTRA["exponential"])
    found = hf.xtrace(hf.dense(matrix), LIKE, max_matvecs=200, seed=0)
    assert sum(found.by_leaf.values()) == pytest.approx(found.value, rel=1e-10)
    assert found.by_leaf["a"] == pytest.approx(float(matrix.diagonal()[:100].sum()), rel=1e-3)


def test_rounds_reuse_every_product() -> None:
    matvec = hf.dense(symmetric(SPECTRA["polynomial"]))
    once = hf.xtrace(matvec, LIKE, max_matvecs=60, block_size=30, seed=2)
    rounds = hf.xtrace(matvec, LIKE, max_matvecs=60, block_size=5, seed=2)
    assert rounds.value == pytest.approx(once.value, rel=1e-9)
    assert (once.matvecs, rounds.matvecs) == (60, 60)
    assert (once.passes, rounds.passes) == (2, 12)


def test_all_unit_vectors_give_the_trace() -> None:
    matrix = symmetric(torch.linspace(-1, 3, 30))
    found = hf.xtrace(hf.dense(matrix), torch.zeros(30).double(), seed=0)
    assert found.value == pytest.approx(30)
    low, high = found.interval()
    assert high - low < 1e-10
    assert (found.matvecs, found.reason) == (30, "exact: all unit vectors were multiplied")


def test_float32() -> None:
    spectrum = SPECTRA["exponential"]
    matvec = hf.dense(symmetric(spectrum).float())
    like: Tensor = torch.zeros(N)
    found = hf.xtrace(matvec, like, max_matvecs=150, seed=0)
    assert found.value == pytest.approx(float(spectrum.sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rtol": -0.1}, "rtol=-0.1"), ({"max_matvecs": 3}, "max_matvecs=3: it must be at least 4")],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.xtrace(hf.dense(symmetric(SPECTRA["flat"])), LIKE, **options)


@pytest.mark.parametrize(("name", "products"), [("exponential", 70), ("step", 140)])
def test_accuracy_on_fast_decay_and_a_step(name: str, products: int) -> None:
    values, like = decaying(1000)[name], torch.zeros(1000).double()
    for seed in range(20):
        found = hf.xtrace(lambda v: v * values, like, max_matvecs=products, seed=seed)
        assert found.value == pytest.approx(float(values.sum()), rel=1e-5)


def test_leave_two_out_is_what_it_says() -> None:
    spectrum = 0.8 ** torch.arange(30).double() * torch.where(torch.arange(30) % 4 == 0, -1.0, 1.0)
    matrix, n, p = symmetric(spectrum), 30, 6
    space = space_of(torch.zeros(n).double())
    probes = space.probes(range(p), kind="sphere", seed=0)
    products = Products(hf.dense(matrix), space)
    sketch = Sketch.empty(space).extended(space, products, probes @ matrix)
    found = xtrace._leave_two_out(space, SketchedProbes(probes, probes @ matrix, sketch, 0))
    for i in range(p):
        for j in set(range(p)) - {i}:
            kept = [m for m in range(p) if m not in (i, j)]
            basis = torch.linalg.qr((probes[kept] @ matrix).mT).Q
            outer = probes[i] - basis @ (basis.mT @ probes[i])
            rescaling = (n - len(kept)) / outer.square().sum()
            expected = (basis.mT @ matrix @ basis).trace() + rescaling * outer @ matrix @ outer
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-9)


def test_lost_curvature_is_the_product_within_the_complement() -> None:
    matrix, n, p = symmetric(0.7 ** torch.arange(20).double()), 20, 5
    space = space_of(torch.zeros(n).double())
    probes = space.probes(range(p), kind="sphere", seed=0)
    images = probes @ matrix
    sketch = Sketch.empty(space).extended(space, Products(hf.dense(matrix), space), images)
    _, complements = xtrace._leave_one_out(space, SketchedProbes(probes, images, sketch, 0))
    for i in range(p):
        others = torch.linalg.qr(images[[m for m in range(p) if m != i]].mT).Q
        direction = images[i] - others @ (others.mT @ images[i])
        direction /= direction.norm()
        product = matrix @ direction
        along = direction @ product
        across = product - others @ (others.mT @ product) - along * direction
        assert float(complements.lost[i]) == pytest.approx(float(along), rel=1e-9)
        assert float(complements.coupling[i]) == pytest.approx(float(across.norm()), rel=1e-6)


@pytest.mark.parametrize("seed", [68, 319, 408, 468])
def test_an_eigenvalue_that_no_probe_sees_is_within_the_interval(seed: int) -> None:
    # Ten probes and ten equal eigenvalues: all estimates are close to 9, and agree. The direction
    # that each product adds is only partly along the missing eigenvector.
    values = torch.where(torch.arange(120) < 10, 1.0, 1e-3).double()
    found = hf.xtrace(hf.dense(values.diag()), torch.zeros(120).double(), max_matvecs=20, seed=seed)
    low, high = found.interval(0.99)
    assert float(found.samples.std()) < 0.2 < 0.9 < float(values.sum()) - found.value
    assert low <= float(values.sum()) <= high
