"""Memory of one rank."""

from __future__ import annotations

import pytest

from hessfunc.app.plan import Lanczos, Network, Setting, Slq, plan


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
