import pytest
import torch

from hessfunc.app.problems.data import digits
from hessfunc.app.problems.fit import accuracy, train
from hessfunc.app.problems.nets import digits_convnet, mlp
from tests.training.blobs import blobs


def test_training_is_a_function_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = train(lambda: mlp([2, 4, 2]), blobs(), epochs=2, seed=seed)
        return torch.nn.utils.parameters_to_vector(model.parameters())

    first = weights(0)
    torch.rand(3)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_the_global_stream_stays() -> None:
    state = torch.get_rng_state()
    train(lambda: mlp([2, 4, 2]), blobs(), epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_is_reported_each_epoch() -> None:
    seen: list[tuple[int, float]] = []
    model = train(
        lambda: mlp([2, 8, 2]), blobs(), epochs=5, on_epoch=lambda *report: seen.append(report)
    )
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5]
    assert seen[-1][1] < seen[0][1]
    assert not model.training


def test_the_convnet_learns_the_digits() -> None:
    pytest.importorskip("sklearn")
    examples = digits()
    model = train(digits_convnet, examples[:1500], epochs=6)
    assert accuracy(model, examples[:1500]) > 0.98
    assert accuracy(model, examples[1500:]) > 0.9
