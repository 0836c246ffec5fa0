"""Ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

import hessfunc as hf
from bench.speed.asked import BY_TORCH, Alternative, Asked, Matrix, Work
from bench.speed.device import on_device
from hessfunc.autograd.matrices import has_faster, torchs_own
from hessfunc.spaces.of import space_of
from hessfunc.transforms.chunks import ChunkSize, Curvature
from hessfunc.trees import Matvec, Tree

Result = TypeVar("Result")


def loss_of(asked: Asked) -> tuple[hf.Loss, Tree, Sequence[tuple[Tensor, Tensor]]]:
    """The loss, the parameters and the batches."""
    model_fn, params = hf.functional(asked.case.model)
    loss = hf.supervised(model_fn, asked.case.criterion)
    return loss, params, asked.batches or [(asked.case.inputs, asked.case.targets)]


def _curvature(asked: Asked, **options: Any) -> tuple[Curvature, Tree]:
    loss, params, _ = loss_of(asked)
    return {"hessian": hf.hvp, "ggn": hf.ggnvp}[asked.matrix](loss, **options), params


def matvec_of(asked: Asked) -> tuple[Matvec, Tree]:
    """The matrix of one batch, or of many with the graph of each kept; and the parameters."""
    curvature, params = _curvature(asked)
    if asked.batches:
        return hf.over_batches(curvature, weight=_targets, keep=True)(params, asked.batches), params
    return curvature(params, (asked.case.inputs, asked.case.targets)), params


def _product(asked: Asked, **options: Any) -> Work:
    curvature, params = _curvature(asked, **options)
    return _work(asked, curvature(params, (asked.case.inputs, asked.case.targets)), params)


def _work(asked: Asked, matvec: Matvec, params: Tree, note: str = "") -> Work:
    space = space_of(params)
    block = space.unravel(asked.rows())
    return Work(lambda: matvec(block), space.ravel, note)


def _one_vector(asked: Asked, mode: Literal["reverse", "forward"], anew: bool = False) -> Work:
    curvature, params = _curvature(asked, mode=mode)
    batch = asked.case.inputs, asked.case.targets
    space = space_of(params)
    block = space.unravel(asked.rows()[:1])
    if anew:
        # A pass frees each graph while it multiplies.
        rebuilding = hf.over_batches(curvature, weight=_targets)(params, [batch])
        return Work(lambda: rebuilding(block), space.ravel)
    matvec = curvature(params, batch)
    return Work(lambda: matvec(block), space.ravel)


def _compiled(asked: Asked) -> Work:
    curvature, params = _curvature(asked)
    compiled = hf.matvecs.compiled(curvature(params, (asked.case.inputs, asked.case.targets)))
    work = _work(asked, compiled, params)
    start = time.perf_counter()
    work.call()
    return _work(asked, compiled, params, f"compiled in {time.perf_counter() - start:.0f} s")


def _over_batches(asked: Asked) -> Work:
    curvature, params = _curvature(asked)
    return _work(asked, hf.over_batches(curvature, weight=_targets)(params, asked.batches), params)


def _targets(batch: tuple[Tensor, Tensor]) -> int:
    """The number of targets: those of tokens are flattened."""
    return len(batch[1])


def in_chunks(asked: Asked, size: ChunkSize) -> Work:
    """Return the products of the block with this ``chunk_size``, in mode reverse."""
    return _product(asked, chunk_size=size, **_REVERSE[asked.matrix])


def has_other_library() -> bool:
    """Whether hessfunc multiplies large matrices by another library than torch does."""
    return has_faster(on_device(torch.empty(0)))


def by_torch(call: Callable[..., Result], /) -> Callable[..., Result]:
    """Return the call with matrix products by torch's own library, in graphs that it builds."""

    def called(*arguments: Any, **options: Any) -> Result:
        with torchs_own():
            return call(*arguments, **options)

    return called


def with_both_libraries(alternatives: Sequence[Alternative]) -> list[Alternative]:
    """Return the alternatives; each of ours also by torch's library, if it has another."""
    both: list[Alternative] = []
    for alternative in alternatives:
        both.append(alternative)
        if alternative.kind == "ours" and has_other_library():
            title = f"{alternative.title}{BY_TORCH}"
            both.append(replace(alternative, title=title, make=_by_torch(alternative.make)))
    return both


def _by_torch(make: Callable[[Asked], Work]) -> Callable[[Asked], Work]:
    def made(asked: Asked) -> Work:
        work = by_torch(make)(asked)
        return replace(work, call=by_torch(work.call))

    return made


def _in_chunks(mode: str, size: ChunkSize) -> Alternative:
    make = partial(_product, mode=mode, chunk_size=size)
    how = "looped" if size == 1 else f"{size} at once"
    return Alternative(f"hessfunc, {mode}, {how}", "hessfunc", "ours", make, f"{mode}, {how}")


PRODUCTS = [Alternative("hessfunc", "hessfunc", "ours", _product)]
# The GGN has one mode.
_REVERSE: dict[Matrix, dict[str, str]] = {"hessian": {"mode": "reverse"}, "ggn": {}}
COMPILED = [Alternative("hessfunc, compiled", "hessfunc", "ours", _compiled)]
DATA = [Alternative("hessfunc", "hessfunc", "ours", _over_batches)]


def MODES(block: int) -> list[Alternative]:
    """Each mode with one vector, and with each size of a chunk of a block."""
    singles = {
        "reverse, 1 vector": ("graph kept, 1 vector", partial(_one_vector, mode="reverse")),
        "reverse, made anew, 1 vector": (
            "graph rebuilt, 1 vector",
            partial(_one_vector, mode="reverse", anew=True),
        ),
        "forward, 1 vector": ("forward, 1 vector", partial(_one_vector, mode="forward")),
    }
    return [
        *(
            Alternative(f"hessfunc, {how}", "hessfunc", "ours", make, alike)
            for how, (alike, make) in singles.items()
        ),
        *(_in_chunks(m, size) for m in ("reverse", "forward") for size in (1, 4, block)),
    ]
