"""Refusal of what has changed since a matvec was made."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.changes import Reads, Rereads, note_read, reading, unchanged, unwritten
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.draws import draws
from hessfunc.transforms.evaluation import kept
from tests.reference import flat

AGAIN: dict[str, Any] = {
    "forward": partial(hf.hvp, mode="forward"),
    "difference": partial(hf.hvp, mode="difference"),
    "over_batches of hvp": lambda loss: over_one_batch(hf.hvp(loss)),
    "over_batches of ggnvp": lambda loss: over_one_batch(hf.ggnvp(loss)),
    "draws": lambda loss: of_draws(hf.hvp(loss)),
}
KEPT: dict[str, Any] = {
    "reverse": hf.hvp,
    "ggnvp": hf.ggnvp,
    "functional_hvp": hf.functional_hvp,
    "pchvp": hf.pchvp,
    "fvp": partial(hf.fvp, samples=1, seed=0),
    "efvp": hf.efvp,
}


def over_one_batch(curvature: Any) -> Any:
    return lambda params, batch: hf.over_batches(curvature)(params, [batch])


def of_draws(curvature: Any) -> Any:
    def made(params: Any, batch: Any) -> Any:
        drawn = draws(curvature)(params, [batch, batch])
        return lambda v: drawn(0)(v)

    return made


def in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(0.5)


def by_data(tensor: Tensor) -> None:
    tensor.data.mul_(0.5)


def by_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[:] = 2.0


def by_another_memory(tensor: Tensor) -> None:
    tensor.data = tensor.data * 0.5


WRITES = [in_place, by_data, by_numpy, by_another_memory]


class Problem:
    """A net of which the second half is fixed, with buffers that shift its activations."""

    def __init__(self, held: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.model.double().eval()[3].requires_grad_(held)
        model_fn, params = hf.functional(self.model)
        self.loss: Any = hf.supervised(model_fn, F.cross_entropy)
        self.params: Mapping[str, Tensor] = params
        if held:
            self.params, rest = hf.split(params, ["0.*", "1.*"])
            self.loss = hf.hold(self.loss, rest)
        self.batch = torch.randn(5, 3).double(), torch.randint(2, (5,))
        self.v = hf.random_like(self.params, 2, seed=0)

    def tensor(self, name: str) -> Tensor:
        return self.model.state_dict(keep_vars=True)[name]


def assert_refused(
    curvature: Any,
    problem: Problem,
    tensor: str,
    write: Callable[[Tensor], None],
    message: str = "has .* since this matvec",
) -> None:
    """A product after the write to a tensor raises, and one before it does not."""
    matvec = curvature(problem.loss)(problem.params, problem.batch)
    matvec(problem.v)
    write(problem.tensor(tensor))
    with pytest.raises(RuntimeError, match=rf"'{re.escape(tensor)}' {message}"):
        matvec(problem.v)


@pytest.mark.parametrize("held", [False, True], ids=["frozen", "held"])
@pytest.mark.parametrize("write", WRITES[:3])
@pytest.mark.parametrize("name", [*AGAIN, *KEPT])
def test_fixed_parameters_that_are_overwritten_are_refused(
    name: str, write: Callable[[Tensor], None], held: bool
) -> None:
    assert_refused((AGAIN | KEPT)[name], Problem(held), "3.weight", write)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", AGAIN)
def test_buffers_that_products_read_again_are_refused(
    name: str, write: Callable[[Tensor], None]
) -> None:
    assert_refused(AGAIN[name], Problem(held=False), "1.running_var", write)


@pytest.mark.parametrize("name", AGAIN)
def test_frozen_parameters_with_another_memory_are_refused(name: str) -> None:
    assert_refused(
        AGAIN[name], Problem(held=False), "3.weight", by_another_memory, "has been overwritten"
    )


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", KEPT)
def test_kept_graphs_do_not_depend_on_buffers(name: str, write: Callable[[Tensor], None]) -> None:
    problem = Problem(held=False)
    matvec = KEPT[name](problem.loss)(problem.params, problem.batch)
    before = flat(matvec(problem.v))
    write(problem.tensor("1.running_var"))
    assert torch.equal(flat(matvec(problem.v)), before)


@pytest.mark.parametrize("write", WRITES[1:])
def test_a_pass_over_batches_refuses_overwritten_parameters(
    write: Callable[[Tensor], None],
) -> None:
    params = {"w": torch.ones(3, dtype=torch.float64)}
    matvec = hf.over_batches(hf.hvp(lambda p, b: (p["w"] * b).prod()), weight=lambda b: 1.0)(
        params, [torch.ones(3).double(), 2 * torch.ones(3).double()]
    )
    v = {"w": torch.ones(1, 3, dtype=torch.float64)}
    matvec(v)
    write(params["w"])
    with pytest.raises(RuntimeError, match="'w' has been overwritten since this matvec"):
        matvec(v)


def test_hvp_by_backward_refuses_buffers_that_have_changed() -> None:
    problem = Problem(held=False)
    model, (x, y) = problem.model, problem.batch
    matvec = hf.hvp_by_backward(model, lambda b: F.cross_entropy(model(b[0]), b[1]))(
        problem.params, (x, y)
    )
    matvec(problem.v)
    in_place(problem.tensor("1.running_mean"))
    with pytest.raises(RuntimeError, match=r"'1\.running_mean' has changed in place"):
        matvec(problem.v)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.arange(100.0).reshape(10, 10),
        torch.arange(720.0).reshape(2, 3, 4, 5, 6),
        torch.arange(50.0).to(torch.bfloat16),
        torch.arange(50),
        torch.zeros(0),
        torch.full((7,), float("nan")),
        torch.arange(60.0).reshape(6, 10).t(),
        torch.ones(3).expand(5, 3),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_tensors_of_any_shape_and_dtype_are_compared(tensor: Tensor) -> None:
    check = unwritten(["x"], [tensor], again=True)
    check()
    if tensor.numel():
        tensor.data = tensor.data + 1
        with pytest.raises(RuntimeError, match="'x' has been overwritten"):
            check()


def test_the_sign_of_zero_is_a_change() -> None:
    x = torch.zeros(4)
    check = unwritten(["x"], [x], again=False)
    x.data.neg_()
    with pytest.raises(RuntimeError, match="'x' has been overwritten"):
        check()


def test_a_change_in_place_has_a_version() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    check = unchanged(["x", "y"], [x, y])
    check()
    y[0] = 0.0
    with pytest.raises(RuntimeError, match="'y' has changed in place"):
        check()


def test_readings_within_each_other_see_the_same_tensors() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    with reading() as outer:
        with reading() as inner:
            note_read([("x", x)], [("y", y)])
        note_read([("y", y)])
    assert inner == Reads({id(x): ("x", x)}, {id(y): ("y", y)})
    assert list(outer.parameters) == [id(x), id(y)]
    note_read([("later", torch.zeros(1))])
    assert len(outer.parameters) == 2


def test_evaluations_read_the_same_each_time() -> None:
    x, later = torch.zeros(2), torch.ones(2)
    rereads = Rereads.of(["x"], [x])
    with rereads.reading():
        note_read([("later", later)])
    with rereads.reading():
        pass
    in_place(later)
    with pytest.raises(RuntimeError, match="'later' has changed in place"), rereads.reading():
        pass


class Stepping(list[Any]):
    """Batches between which somebody writes, as another thread that trains would."""

    def __init__(self, batches: Any, write: Callable[[], None]) -> None:
        super().__init__(batches)
        self.write = write

    def __iter__(self) -> Any:
        for i, batch in enumerate(super().__iter__()):
            if i:
                self.write()
            yield batch


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["0.weight", "3.weight", "1.running_var"])
def test_a_write_between_two_batches_is_refused(name: str, keep: bool) -> None:
    problem = Problem(held=False)
    batches = Stepping([problem.batch] * 2, lambda: in_place(problem.tensor(name)))
    with pytest.raises(RuntimeError, match=rf"'{re.escape(name)}' has changed in place"):
        hf.over_batches(hf.hvp(problem.loss), keep=keep)(problem.params, batches)(problem.v)


def in_another_thread(tensor: Tensor) -> None:
    thread = threading.Thread(target=in_place, args=(tensor,))
    thread.start()
    thread.join()


@pytest.mark.parametrize("name", ["3.weight", "1.running_var"])
@pytest.mark.parametrize("kind", ["forward", "difference"])
def test_a_write_during_a_product_is_refused(kind: str, name: str) -> None:
    problem = Problem(held=False)
    waiting: list[bool] = []

    def loss(params: Any, batch: Any) -> Tensor:
        value = problem.loss(params, batch)
        if waiting:
            waiting.pop()
            in_another_thread(problem.tensor(name))
        return value

    matvec = hf.hvp(loss, mode=kind)(problem.params, problem.batch)  # type: ignore[arg-type]
    matvec(problem.v)
    waiting.append(True)
    with pytest.raises(RuntimeError, match="has changed in place"):
        matvec(problem.v)


@pytest.mark.parametrize("name", KEPT)
def test_a_write_while_the_loss_is_evaluated_is_refused(name: str) -> None:
    problem = Problem(held=False)
    outputs = problem.loss.outputs

    def trained(params: Any, batch: Any) -> Tensor:
        out = outputs(params, batch)
        in_place(problem.tensor("3.weight"))
        return out

    loss = hf.composed(trained, problem.loss.criterion)
    with pytest.raises(RuntimeError, match="has changed in place"):
        KEPT[name](loss)(problem.params, problem.batch)(problem.v)


class Overtaken(list[Tensor]):
    """Leaves of which one is written while they are copied."""

    def __iter__(self) -> Any:
        for i, leaf in enumerate(super().__iter__()):
            if i:
                in_place(self[0])
            yield leaf


def test_copies_of_parameters_of_two_steps_are_refused() -> None:
    leaves = [torch.ones(2), torch.ones(3)]
    space = space_of(leaves)
    assert all(torch.equal(*pair) for pair in zip(kept(space, leaves), leaves, strict=True))
    with pytest.raises(RuntimeError, match="changed in place"):
        kept(space, Overtaken(leaves))


def test_products_during_a_training_are_right_or_refused() -> None:
    # H = diag(w^2) of sum w^4 / 12, so that products of a consistent w = t 1 are multiples of v.
    w = torch.ones(20_000, dtype=torch.float64)
    curvature = hf.over_batches(hf.hvp(lambda p, b: p["w"].pow(4).sum() / 12), weight=lambda b: 1.0)
    v, ended = {"w": torch.ones_like(w)[None]}, threading.Event()

    def train() -> None:
        while not ended.wait(1e-4):
            w.mul_(1.01)

    answers: list[Tensor] = []
    refusals: list[RuntimeError] = []
    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(50):
            try:
                answers.append(curvature({"w": w}, [None] * 2)(v)["w"])
            except RuntimeError as error:
                refusals.append(error)
    finally:
        ended.set()
        thread.join()
    assert len(answers) + len(refusals) == 50
    told = "has changed in place", "overwritten since this matvec was made"
    assert [e for e in refusals if not any(words in str(e) for words in told)] == []
    for product in answers:
        assert (product / product.flatten()[0] - 1).abs().max() < 1e-12
