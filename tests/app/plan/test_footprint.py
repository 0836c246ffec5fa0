"""Memory of one rank."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch.distributed as dist

from bench import planned
from hessfunc.app.plan import Lanczos, Network, Setting, Slq, plan
from hessfunc.memory import Footprint
from tests.distributed import problems
from tests.distributed.ranks import Ranks

WIDTH = 360


def share_of_what_was_taken(algorithm: str) -> float:
    """The bytes that were planned for this rank over those of its tensors."""
    # Repeated eigenvalues do not matter here.
    warnings.simplefilter("ignore")
    mesh = problems.mesh(dist.get_world_size())
    gc.collect()
    with Footprint() as memory:
        planned._run(WIDTH, algorithm, mesh)
    plan = planned.planned(WIDTH, dist.get_world_size(), algorithm, activations=0)
    return plan.peak.total / memory.peak


@pytest.mark.parametrize("algorithm", ["power", "divided", "frozen"])
def test_plans_are_within_25_percent_of_what_is_taken(algorithm: str, two: Ranks) -> None:
    for share in two.run(share_of_what_was_taken, algorithm):
        assert share == pytest.approx(1, abs=0.25)


def test_parameters_are_divided_too() -> None:
    network = Network(10**6, 10**5, block=10**5, frozen=10**6)
    one, four = (plan(Setting(network, r, divided=True), Lanczos()).peak.held for r in (1, 4))
    for name in ("parameters", "basis", "graph: parameters"):
        assert one[name] == 4 * four[name]
    assert one["parameters"] == 2 * one["graph: parameters"] == 8 * 10**6
    assert one["gathered block"] == four["gathered block"] == 3 * 4 * 10**5


def test_weights_in_16_bits_leave_vectors_as_they_are() -> None:
    network = Network(10**6, 10**5, activations=10**6)
    plain, narrow = (plan(Setting(n), Slq()).peak for n in (network, network.stored_in_bfloat16()))
    # The parameters, and their copy beside the graph.
    assert plain.total - narrow.total == 2 * 2 * 10**6


def test_vectors_alone_are_divided_by_ranks() -> None:
    network = Network(10**6, 10**5)
    one, four = (plan(Setting(network, ranks), Slq(steps=50)).peak.held for ranks in (1, 4))
    assert one["basis"] == 4 * four["basis"] == 49 * 4 * 10**6
    assert one["parameters"] == four["parameters"]
    assert one["sum over batches"] == four["sum over batches"] == 4 * (10**6 + 2)
    whole_on_each = plan(Setting(network, 4, sharded=False), Slq(steps=50)).peak.held
    assert whole_on_each["basis"] == one["basis"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="choose bfloat16, float16, float32, float64"):
        Network(10, 5, "int8")
    with pytest.raises(ValueError, match="the largest leaf must have 1 to 10 entries"):
        Network(10, 11)
    with pytest.raises(ValueError, match="at least one rank is required"):
        Setting(Network(10, 5), 0)
    with pytest.raises(ValueError, match="at least k \\+ 2 block_size = 12"):
        Lanczos(k=10, basis_size=11)
    with pytest.raises(ValueError, match="choose bfloat16, float32 or float64"):
        Lanczos(basis_dtype="float16")
