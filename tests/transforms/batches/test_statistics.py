"""Statistics of batches."""

import torch

from hessfunc.transforms.batches.statistics import Statistics


def test_sums_are_divided_by_their_number_of_terms() -> None:
    made = Statistics({"B": torch.ones(2)}, {"A": (torch.full((2,), 6.0), 4)}).mean()
    assert made["B"].tolist() == [1, 1]
    assert made["A"].tolist() == [1.5, 1.5]
