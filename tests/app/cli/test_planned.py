"""Tables and sentences of a plan."""

import pytest

from hessfunc.app.plan import Lanczos, Setting, Transformer
from hessfunc.app.plan import plan as planned
from tests.app.cli.commands import LARGE, SMALL, number, plan


def test_what_fits_is_said_to_fit() -> None:
    done = plan(*SMALL, "--ranks", "4", "--gpu-memory", "24")
    assert done.exit_code == 0, done.output
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert first == (
        "lanczos: 10 pairs, 100 products, basis of 80 vectors, 100,000,000 parameters, 4 ranks, "
        "vectors sharded"
    )
    (peak,) = number(done.stdout, "total")
    assert last == f"It fits: {peak:.2f} of 21.00 GiB per rank."
    assert "changes that need less memory" not in done.stdout


def test_the_parts_are_those_of_the_plan() -> None:
    done = plan(*LARGE, "--basis-size", "30")
    assert done.exit_code == 1, done.output
    network = Transformer.usual(7 * 10**9).network("float32", tokens=2048, context=2048)
    peak = planned(Setting(network, 64), Lanczos(basis_size=30)).peak
    for what, size in peak.held.items():
        assert number(done.stdout, what) == [pytest.approx(size / 2**30, abs=0.005)]
    assert number(done.stdout, "total") == [pytest.approx(peak.total / 2**30, abs=0.005)]
    assert f"peak memory per rank, during {peak.name}" in done.stdout


def test_what_does_not_fit_is_said_with_what_would_help() -> None:
    done = plan(*LARGE)
    assert "It does not fit in 77.00 GiB per rank" in done.stdout
    assert "More ranks alone do not help: " in done.stdout
    for remedy in ("parameters in bfloat16", "basis_dtype=torch.bfloat16", "all of these"):
        assert remedy in done.stdout
    unsharded = plan(*SMALL, "--ranks", "8", "--gpu-memory", "12", "--unsharded")
    assert "vectors replicated" in unsharded.stdout
    assert "space=hf.sharded(params, mesh)" in unsharded.stdout


def test_the_fewest_ranks_are_enough() -> None:
    arguments = (*SMALL, "--algorithm", "slq", "--steps", "200", "--gpu-memory", "20")
    done = plan(*arguments, "--ranks", "1")
    sentence = next(line for line in done.stdout.splitlines() if "ranks are enough" in line)
    fewest = int(sentence.split()[-4])
    assert fewest > 1
    assert "It fits" in plan(*arguments, "--ranks", str(fewest)).stdout
    assert "It fits" not in plan(*arguments, "--ranks", str(fewest - 1)).stdout


def test_a_basis_that_is_cut_is_told() -> None:
    done = plan("--params", "1e9", "--graph-memory", "0", "--ranks", "2", "--gpu-memory", "100")
    assert "Vectors may use at most half of the free memory" in done.stdout
    assert "becomes lanczos: 10 pairs, 100 products, basis of" in done.stdout


def test_every_number_says_where_it_comes_from() -> None:
    output = plan(*SMALL, "--latency", "10", "--gradient-seconds", "0.5").stdout
    lines = {line.strip() for line in output.splitlines()}
    for what, source in (
        ("activations per batch", "given"),
        ("latency", "given"),
        ("time of a gradient", "given"),
        ("memory bandwidth", "assumed"),
        ("cost of graph, product", "counted in operations"),
    ):
        assert any(x.startswith(what) and x.endswith(source) for x in lines), what
    assert "measured on GPTs" in plan("--params", "1e8").stdout
