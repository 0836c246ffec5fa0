"""Statistics of batches, and their weighted sums."""

import pytest
import torch
from torch import Tensor

from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.batches.statistics import Statistics, Total, of_statistics


def statistics(b: float, a: float, count: float) -> Statistics:
    return Statistics({"B": torch.full((2,), b)}, {"A": (torch.full((1, 2), a), count)})


def test_sums_are_divided_by_their_number_of_terms() -> None:
    made = statistics(1, 6, 4).mean()
    assert made["B"].tolist() == [1, 1]
    assert made["A"].tolist() == [[1.5, 1.5]]


def test_means_are_weighted_and_sums_are_not() -> None:
    total = Total.of([(statistics(1, 6, 4), 3.0), (statistics(5, 2, 12), 1.0)])
    mean = total.mean(Average(None, reduction="mean"))
    assert mean["B"].tolist() == [2, 2]
    assert mean["A"].tolist() == [[0.5, 0.5]]
    assert total.mean(Average(None, reduction="sum"))["B"].tolist() == [8, 8]


def test_the_numbers_of_two_processes_are_added() -> None:
    one, two = (Total.of([(statistics(*numbers), 2.0)]) for numbers in ((1, 6, 4), (3, 4, 2)))
    device = torch.device("cpu")
    both = one.unflattened(one.flat(device) + two.flat(device))
    assert both.weight == 4
    assert both.mean(Average(None))["B"].tolist() == [2, 2]
    assert both.statistics.summed["A"][1] == 6
    assert both.statistics.summed["A"][0].shape == (1, 2)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="weights of the batches sum to zero"):
        Total.of([]).mean(Average(None))
    other = Statistics({"C": torch.ones(2)})
    with pytest.raises(ValueError, match="uses its parameters in another way"):
        Total.of([(statistics(1, 1, 1), 1.0), (other, 1.0)])


def test_other_curvature_functions_have_no_statistics() -> None:
    class Structured:
        def over_batches(self, params: Tensor, mean: object, /) -> object:
            return mean

    structured = Structured()
    assert of_statistics(structured) is structured
    assert of_statistics(lambda params, batch: None) is None
