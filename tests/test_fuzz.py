"""Random wrong arguments of every public function: a right value, or an error of this project's."""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
import random
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

import hessfunc as hf
from hessfunc import plot
from hessfunc.compat import curvlinops, eigenthings, hessianflow, pyhessian
from hessfunc.compat.curvlinops.examples import TensorLinearOperator
from hessfunc.trees import leaves, tree_map
from tests import public

HOME = Path(hf.__file__).parent
# A budget of memory that is too small, and a file that does not exist, have their own errors.
ERRORS = (
    TypeError, ValueError, NotImplementedError, RuntimeError, MemoryError, FileNotFoundError
)  # fmt: skip
SECONDS = 10.0

D = torch.float64
MATRIX = torch.diag(torch.arange(1.0, 7.0, dtype=D))
LIKE = torch.zeros(6, dtype=D)
B = torch.ones(6, dtype=D)
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
CRITERION = nn.functional.cross_entropy
MODEL_FN, PARAMS = hf.functional(MODEL)
LOSS = hf.supervised(MODEL_FN, CRITERION)
BATCH = torch.randn(4, 3, dtype=D), torch.tensor([0, 1, 1, 0])
ONES = {name: torch.ones_like(leaf) for name, leaf in PARAMS.items()}
OPTIMIZER = torch.optim.Adam(MODEL.parameters())


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 2), nn.Linear(2, 5)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.head(self.embedding(input_ids)),)


def stepped() -> torch.optim.Optimizer:
    (MODEL(BATCH[0]) ** 2).sum().backward()
    for group in OPTIMIZER.param_groups:
        group["lr"] = 0.0
    OPTIMIZER.step()
    OPTIMIZER.zero_grad()
    return OPTIMIZER


stepped()


matvec = hf.dense(MATRIX)


PAIRS = hf.lanczos(matvec, B, k=2, seed=0)
SCALE = torch.ones((), dtype=torch.float64, requires_grad=True)


def with_graph(block: Any) -> Any:
    return tree_map(lambda leaf: SCALE * leaf, matvec(block))


def draws(i: int) -> Callable[[Tensor], Tensor]:
    return hf.matvecs.scale(matvec, 1.0 + i % 2)


def product(curvature: Any) -> Any:
    return hf.apply(curvature(PARAMS, BATCH), ONES)


def over(curvature: Any) -> Any:
    return hf.apply(curvature(PARAMS, [BATCH]), ONES)


def applied(made: Any) -> Any:
    return hf.apply(made, B)


def value(made: Any) -> Any:
    return made


def of_loss(loss: Any) -> Any:
    return loss(PARAMS, BATCH)


def blocks_of(curvature: Any) -> Any:
    return curvature(PARAMS, BATCH).trace()


def watched(tracker: Any) -> Any:
    with tracker as inner:
        return inner.step()


@dataclasses.dataclass(frozen=True)
class Call:
    """A valid call: positional arguments by name, options, and what is made of the result."""

    args: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    then: Callable[[Any], Any] = value
    function: Callable[..., Any] | None = None


def entered(limit: Any) -> bool:
    """Enter a context manager, and leave it."""
    with limit:
        return True


RUN = {
    "seed": 0,
    "callback": None,
    "progress": False,
    "space": None,
    "checkpoint": None,
    "memory": None,
    "max_matvecs": 12,
}
TRACE = RUN | {"rtol": 0.5, "atol": 0.1, "block_size": 2}
SOLVE = {
    "damping": 0.5, "preconditioner": matvec, "start": B, "rtol": 1e-6, "atol": 0.0,
    "max_matvecs": 40, "space": None, "callback": None, "progress": None, "checkpoint": None,
    "memory": None,
}  # fmt: skip
OF_LOSS = {"loss": LOSS}
OF_FACTORS = {"unsupported": "error", "bias": "apart"}
OF_DATA = {"loss": LOSS, "params": PARAMS, "batches": [BATCH]}
FUNCTIONS = public.functions()
# A call of tanh on a batch of two examples, for the rules of Hessian backpropagation.
OF_RULE = {
    "call": hf.kronecker.Call(
        function=lambda params, x: x.tanh(), params={}, inputs=(torch.ones(2, 3, dtype=D),),
        moving=(0,), module=nn.Tanh(), shape=torch.Size([3]),
    )
}  # fmt: skip
INFLUENCE = {
    "damping": 1.0, "curvature": hf.hvp(LOSS), "preconditioner": None, "rtol": 0.1,
    "max_matvecs": 20, "weight": hf.examples, "keep": False, "examples_per_chunk": 2,
    "progress": None,
}  # fmt: skip
CALLS: dict[str, Call] = {
    "attached.eigenvalues": Call({"matvec": with_graph, "pairs": PAIRS}),
    "attached.eigenvectors": Call(
        {"matvec": with_graph, "pairs": PAIRS}, {"rtol": 1e-3, "max_matvecs": 40}
    ),
    "attached.trace": Call({"matvec": with_graph, "probes": MATRIX[:2]}),
    "attached.diagonal": Call({"matvec": with_graph, "probes": MATRIX[:2]}),
    "attached.function": Call({"matvec": with_graph, "f": torch.exp, "b": B}, {"steps": 3}),
    "attached.trace_of_function": Call(
        {"matvec": with_graph, "f": torch.exp, "like": B}, {"probes": 2, "steps": 3, "seed": 0}
    ),
    "attached.logdet": Call(
        {"matvec": with_graph, "like": B},
        {"damping": 9.0, "probes": 2, "steps": 3, "seed": 0},
    ),
    "functional": Call(
        {"model": MODEL},
        {
            "trainable_only": True,
            "dtype": D,
            "device": None,
            "recompute": None,
            "mesh": None,
            "shard": None,
        },
    ),
    "supervised": Call({"model_fn": MODEL_FN, "criterion": CRITERION}, then=of_loss),
    "composed": Call(
        {"outputs": lambda p, b: MODEL_FN(p, b[0]), "criterion": CRITERION},
        {"targets": lambda b: b[1]},
        of_loss,
    ),
    "linear_head_loss": Call(
        {"states": lambda p, b: (b[0], p["0.weight"], p["0.bias"]), "targets": lambda b: b[1]},
        {
            "scale": 1.0,
            "softcap": 2.0,
            "ignore_index": -100,
            "label_smoothing": 0.1,
            "reduction": "mean",
            "rows_per_chunk": 2,
        },
        of_loss,
    ),
    "linear_cross_entropy": Call(
        {"hidden": torch.ones(3, 2), "weight": torch.ones(4, 2), "targets": torch.arange(3)},
        {
            "bias": torch.ones(4),
            "scale": 1.0,
            "softcap": 2.0,
            "ignore_index": -100,
            "label_smoothing": 0.1,
            "reduction": "mean",
            "rows_per_chunk": 2,
        },
    ),
    "language_model_loss": Call(
        {"model": LanguageModel()},
        {
            "shift": True,
            "trainable_only": True,
            "dtype": torch.float32,
            "device": None,
            "recompute": "embedding",
            "mesh": None,
            "shard": None,
            "rows_per_chunk": 2,
        },
    ),
    "split": Call({"tree": PARAMS, "pattern": "0.*"}),
    "hold": Call({"loss": LOSS, "rest": {}}, then=of_loss),
    "sliced": Call({"loss": LOSS, "params": PARAMS, "slices": {"0.weight": 0}}),
    "recomputed": Call({"fn": torch.tanh}, then=lambda f: f(B)),
    "hvp": Call(OF_LOSS, {"mode": "reverse", "chunk_size": 1, "differentiable": True}, product),
    "ggnvp": Call(OF_LOSS, {"chunk_size": 1, "differentiable": True}, product),
    "fvp": Call(
        OF_LOSS, {"samples": 2, "seed": 0, "chunk_size": 1, "differentiable": True}, product
    ),
    "efvp": Call(OF_LOSS, {"chunk_size": 1, "differentiable": True}, product),
    "pchvp": Call(OF_LOSS, {"residual": "abs", "chunk_size": 1}, product),
    "functional_hvp": Call(
        OF_LOSS, {"mode": "reverse", "chunk_size": 1, "differentiable": True}, product
    ),
    "activations": Call(
        {"model": MODEL, "criterion": CRITERION, "select": "2"},
        {"at": "input"},
        lambda made: hf.apply(hf.hvp(made[0])(made[1](BATCH[0]), BATCH), made[1](BATCH[0])),
    ),
    "with_output_hessian": Call({"criterion": CRITERION, "output_hessian": lambda o, t: None}),
    "over_batches": Call(
        {"curvature": hf.hvp(LOSS)},
        {"weight": hf.examples, "keep": False, "mesh": None, "data": "replicated"},
        over,
    ),
    "tune": Call(
        {"family": partial(hf.hvp, LOSS), "params": PARAMS, "batch": BATCH},
        {"vectors": 2},
        lambda size: size in (1, 2),
    ),
    "hvp_by_backward": Call({"model": MODEL, "loss": lambda b: CRITERION(MODEL(b[0]), b[1])}),
    "unsharded": Call({"model": MODEL}, {"trainable_only": True}),
    "draws": Call(
        {"curvature": hf.hvp(LOSS)},
        {"weight": hf.examples, "replace": False, "proxy": LOSS, "seed": 0},
        lambda made: hf.apply(made(PARAMS, [BATCH])(0), ONES),
    ),
    "examples": Call({"batch": BATCH}),
    "microbatches": Call({"batch": BATCH, "size": 2}),
    "memory_limit": Call({"memory": 1e9}, {}, entered),
    "hbp": Call(
        {"loss": LOSS, "model": MODEL},
        {
            "residual": "abs", "average_input_jacobian": True,
            "average_parameter_jacobian": True, "max_blocks": 2,
        },
        blocks_of,
    ),
    "kfra": Call({"loss": LOSS, "model": MODEL}, {"sharing": "expand"}, blocks_of),
    "kfoc": Call(
        {"loss": LOSS, "model": MODEL},
        OF_FACTORS | {"steps": 1, "samples": 2, "seed": 0},
        blocks_of,
    ),
    "error": Call(
        {"blocks": matvec, "matvec": matvec, "like": LIKE}, RUN | {"rtol": 0.5, "block_size": 2}
    ),
    "kflr": Call(
        {"loss": LOSS, "model": MODEL}, OF_FACTORS | {"sharing": "expand"}, blocks_of
    ),
    "kfac": Call(
        {"loss": LOSS, "model": MODEL},
        OF_FACTORS | {"samples": 1, "seed": 0, "sharing": "expand", "fisher": "model"},
        blocks_of,
    ),
    "ekfac": Call(
        {"loss": LOSS, "model": MODEL},
        OF_FACTORS | {"samples": 2, "seed": 0, "sharing": "expand", "fisher": "model"},
        blocks_of,
    ),
    "apply": Call({"matvec": matvec, "vector": B}),
    "shift": Call({"matvec": matvec, "s": 2.0}, then=applied),
    "scale": Call({"matvec": matvec, "a": 2.0}, then=applied),
    "add": Call({"one": matvec, "other": matvec}, then=applied),
    "deflate": Call(
        {"matvec": matvec, "pairs": hf.lanczos(matvec, LIKE, k=1, seed=0)}, then=applied
    ),
    "precondition": Call({"matvec": matvec, "diagonal": B}, then=applied),
    "per_block": Call({"matvec": matvec, "like": LIKE}, {"blocks": None}, applied),
    "batched": Call({"fn": lambda v: MATRIX @ v}, {"chunk_size": 1}, applied),
    "dense": Call({"matrix": MATRIX}, then=applied),
    "to_scipy": Call({"matvec": matvec, "like": LIKE}, then=lambda op: op @ np.ones(op.shape[1])),
    "from_scipy": Call({"operator": MATRIX.numpy()}, then=applied),
    "from_numpy": Call(
        {"function": lambda v: MATRIX.numpy() @ v}, {"n": len(MATRIX), "xp": np}, applied
    ),
    "from_linear_operator": Call({"operator": MATRIX.to_sparse()}, then=applied),
    "compiled": Call({"matvec": matvec}, {"chunk_size": 1, "backend": "eager"}),
    "ravel": Call({"tree": PARAMS}),
    "unravel": Call({"flat": torch.ones(14, dtype=D), "like": PARAMS}),
    "random_like": Call({"like": LIKE, "k": 3}, {"kind": "signs", "seed": 0, "start": 1}),
    "power_iteration": Call(
        {"matvec": matvec, "like": LIKE},
        RUN | {"k": 1, "which": "LM", "momentum": 0.0, "rtol": 0.1, "start": B},
    ),
    "stochastic_power_iteration": Call(
        {"matvec": matvec, "draws": draws, "like": LIKE},
        RUN | {"momentum": 0.0, "steps_per_epoch": 2, "rtol": 0.1, "start": B},
    ),
    "lanczos": Call(
        {"matvec": matvec, "like": LIKE},
        RUN
        | {
            "k": 2, "which": "LM", "block_size": 1, "basis_size": 6, "basis_bytes": 2**20,
            "basis_dtype": D, "basis_device": "cpu", "rtol": 0.1, "atol": 0.0, "search": 2,
            "start": B, "sigma": None, "metric": 2 * B,
        },
    ),
    "hutchinson": Call(
        {"matvec": matvec, "like": LIKE},
        TRACE
        | {
            "kind": "signs",
            "deflate": hf.lanczos(matvec, LIKE, k=1, seed=0),
            "known": B,
            "confidence": "anytime",
        },
    ),
    "trace": Call(
        {"matvec": matvec, "like": LIKE},
        TRACE
        | {
            "method": "auto",
            "start": hf.lanczos(matvec, LIKE, k=1, seed=0),
            "confidence": "anytime",
        },
    ),
    "hutchpp": Call({"matvec": matvec, "like": LIKE}, TRACE),
    "xtrace": Call({"matvec": matvec, "like": LIKE}, TRACE),
    "xnystrace": Call({"matvec": matvec, "like": LIKE}, TRACE),
    "sampled_trace": Call(
        {"draws": draws, "like": LIKE}, TRACE | {"probes": 2, "kind": "signs"}
    ),
    "hessian_trace": Call(
        OF_DATA,
        TRACE
        | {
            "weight": hf.examples, "keep": False, "mesh": None, "data": "replicated",
            "examples_per_chunk": 2,
        },
    ),
    "ggn_diagonal": Call(
        OF_DATA,
        {
            "weight": hf.examples, "mesh": None, "data": "replicated", "examples_per_chunk": 2,
            "progress": None,
        },
    ),
    "diagonal": Call(
        {"matvec": matvec, "like": LIKE},
        RUN
        | {
            "rtol": 0.5, "block_size": 2, "method": "auto",
            "start": hf.lanczos(matvec, LIKE, k=1, seed=0),
        },
    ),
    "hutchinson_diagonal": Call(
        {"matvec": matvec, "like": LIKE}, RUN | {"rtol": 0.5, "block_size": 2}
    ),
    "xdiag": Call({"matvec": matvec, "like": LIKE}, RUN | {"rtol": 0.5, "block_size": 2}),
    "slq": Call(
        {"matvec": matvec, "like": LIKE},
        RUN
        | {
            "probes": 2,
            "steps": 4,
            "basis_device": "cpu",
            "keep_basis": False,
            "deflate": hf.lanczos(matvec, LIKE, k=1, seed=0),
        },
    ),
    "function": Call(
        {"matvec": matvec, "f": torch.exp, "b": B},
        RUN
        | {
            "like": None, "rtol": 0.1, "atol": 0.0, "smallest": 0.0, "largest": 9.0,
            "basis_size": 3,
        },
    ),
    "logdet": Call(
        {"matvec": matvec, "like": LIKE},
        RUN | {"damping": 9.0, "rtol": 0.1, "atol": 0.0, "smallest": -8.0},
    ),
    "trace_of_function": Call(
        {"matvec": matvec, "f": torch.exp, "like": LIKE},
        RUN | {"rtol": 0.1, "atol": 0.0, "smallest": -9.0, "largest": 9.0},
    ),
    "cg": Call({"matvec": matvec, "b": B}, SOLVE | {"like": None, "measure": True}),
    "minres": Call({"matvec": matvec, "b": B}, SOLVE | {"like": None}),
    "implicit_gradient": Call(
        {
            "outer": lambda p, h, batch: LOSS(p, batch),
            "inner": lambda p, h, batch: LOSS(p, batch) + hf.ravel(h).sum() * hf.inner(p, p),
            "params": PARAMS,
            "hyperparams": torch.ones((), dtype=D),
        },
        {
            "outer_batches": [BATCH], "inner_batches": [BATCH], "solve": hf.cg, "damping": 1.0,
            "preconditioner": None, "start": None, "rtol": 0.1, "atol": 0.0, "max_matvecs": 20,
            "weight": hf.examples, "keep": False, "stationarity": 1.0, "seed": 0,
            "callback": None, "progress": None, "space": None, "checkpoint": None, "memory": None,
        },
    ),
    "matrix": Call(
        {"matvec": matvec, "like": LIKE},
        {"rows": None, "columns": [0, 1], "chunk_size": 2, "callback": None, "progress": None},
    ),
    "inner": Call({"a": B, "b": B}),
    "overlap": Call({"a": PAIRS, "b": B}, {"like": LIKE, "space": None}),
    "block_spectra": Call(
        OF_DATA,
        {
            "blocks": ["0.weight"], "weight": hf.examples, "keep": False, "curvature": hf.hvp,
            "algorithm": lambda mv, like: hf.lanczos(mv, like, k=1, seed=0), "callback": None,
            "progress": None,
        },
    ),
    "influence": Call(
        {"loss": LOSS, "params": PARAMS, "train_batches": [BATCH], "query_batches": [BATCH]},
        INFLUENCE
        | {
            "query_loss": None, "aggregate": False, "by_leaf": True, "by_token": False, "rank": 2,
            "mesh": None, "checkpoint": None,
        },
    ),
    "self_influence": Call(
        {"loss": LOSS, "params": PARAMS, "train_batches": [BATCH]},
        INFLUENCE | {"mesh": None, "checkpoint": None},
    ),
    "landscape": Call(
        OF_DATA | {"direction": ONES},
        {
            "radius": 1.0, "points": 3, "at": None, "normalise": None, "weight": hf.examples,
            "points_per_chunk": 2, "callback": None, "progress": None,
        },
    ),
    "laplace": Call(
        OF_DATA,
        {
            "structure": "full", "prior_precision": 2.0, "temperature": 0.5, "noise": None,
            "model": None, "rank": None, "seed": 0,
        },
    ),
    "calibration": Call(
        {"probabilities": torch.eye(2)[BATCH[1]], "targets": BATCH[1]}, {"bins": 5}
    ),
    "critical_sharpness": Call(
        {"loss": LOSS, "params": PARAMS, "batch": BATCH, "direction": ONES},
        {"rtol": 0.1, "start": 1.0, "max_evaluations": 20, "progress": None},
    ),
    "stability": Call(
        {"optimizer": OPTIMIZER, "model": MODEL}, {"gradient": ONES, "lr": 0.1}
    ),
    "generalized_sharpness": Call(
        {
            "matvec": matvec, "like": LIKE,
            "norm": lambda v: (
                sum(x.abs().reshape(len(x), -1).sum(1) for x in leaves(v)), tree_map(torch.sign, v)
            ),
        },
        RUN | {"restarts": 2, "rtol": 0.1, "max_matvecs": 40, "start": None},
    ),
    "check": Call(
        {"matvec": matvec, "like": LIKE},
        {"gradient": lambda p: hf.apply(matvec, p), "tolerance": 1e-3, "seed": 0},
    ),
    "newton": Call({}, {"lr": 0.1, "alpha": 0.5, "solve": None}),
    "exact_blocks": Call({"curvature": hf.hvp, "loss": LOSS}),
    "conjugate_gradients": Call({}, {"rtol": 1e-5, "atol": 1e-8, "max_matvecs": 20}),
    "direct": Call({}),
    "absa": Call(
        {},
        {
            "epochs": 9, "max_ratio": 4, "factor": 2, "adversarial_share": 0.2, "patience": 1,
            "lr_decay": 0.2, "lr_decay_epochs": (3, 6),
        },
    ),
    "fgsm": Call(
        {"loss": LOSS, "params": PARAMS, "batch": BATCH}, {"eps": 0.01, "bounds": (-9.0, 9.0)}
    ),
    "pgd": Call(
        {"loss": LOSS, "params": PARAMS, "batch": BATCH},
        {"eps": 0.01, "step_size": 0.005, "steps": 2, "bounds": None, "seed": 0},
    ),
    "tracked": Call(
        {"model": MODEL, "criterion": CRITERION, "batches": [BATCH]},
        {
            "every": 1, "optimizer": OPTIMIZER, "preconditioned": False, "stability": None,
            "compose": hf.supervised, "eval_mode": True, "out": None, "csv": None,
            "tensorboard": None, "wandb": None, "callback": None, "progress": None, "steps": 0,
            "epoch": 0.0,
        },
        watched,
    ),
    "frozen": Call({"loader": [BATCH], "batches": 1}),
    "functional_tracker": Call(
        OF_LOSS,
        {
            "curvature": hf.hvp, "top": 1, "bottom": 0, "trace_probes": 2, "critical": False,
            "guards": 1, "rtol": 0.1, "max_matvecs": 20, "weight": hf.examples, "keep": False,
            "seed": 0,
        },
    ),
    "pool": Call(
        {"estimates": [hf.hutchinson(matvec, LIKE, seed=0, max_matvecs=4)], "weights": [1.0]}
    ),
    "rule": Call({"targets": nn.Tanh}),
    "rule_of": Call({"target": nn.Tanh}),
    **{
        name: Call(OF_RULE)
        for name in (
            "by_autodiff", "elementwise", "linear", "piecewise_linear", "reshaped", "selection"
        )
    },
    "load": Call({"path": "no_such_file.npz"}),
    "read": Call({"path": "no_such_file.jsonl"}),
    "sharded": Call({"like": LIKE, "mesh": None}),
}  # fmt: skip
BLOCKS = hf.kronecker.kfac(LOSS, MODEL, seed=0)(PARAMS, BATCH)
BLOCK = {name: leaf[None] for name, leaf in ONES.items()}


def tracked_step(*args: Any, **options: Any) -> Any:
    """What a step of a new tracker gives."""
    with hf.tracking.tracked(MODEL, CRITERION, [BATCH], every=1) as tracker:
        point = tracker.step(*args, **options)
        return "not measured" if point is None else dataclasses.replace(point, seconds=0.0)


DENSITY = hf.slq(matvec, LIKE, probes=2, steps=4, seed=0)
TRACE_FOUND = hf.hutchinson(matvec, LIKE, seed=0, max_matvecs=4)
OTHER_FOUND = hf.hutchinson(matvec, LIKE, seed=1, max_matvecs=4)
DIAGONAL_FOUND = hf.hutchinson_diagonal(matvec, LIKE, seed=0, max_matvecs=4)
SAMPLED_FOUND = hf.sampled_trace(draws, LIKE, probes=2, seed=0, max_matvecs=12)
INFLUENCES = hf.influence(LOSS, PARAMS, [BATCH], [BATCH], damping=1.0)
OWN_INFLUENCES = hf.self_influence(LOSS, PARAMS, [BATCH], damping=1.0)
LINE = hf.landscape(LOSS, PARAMS, [BATCH], ONES, points=3)
PLANE = hf.landscape(
    LOSS,
    PARAMS,
    [BATCH],
    {
        name: torch.stack([leaf, torch.arange(leaf.numel(), dtype=D).view(leaf.shape) - 1])
        for name, leaf in ONES.items()
    },
    points=3,
)


def drawn(found: Any) -> Any:
    from matplotlib import pyplot

    pyplot.close("all")
    return type(found).__name__


# Methods of results, figures and drop-in replacements, which are not called by a name of `hf`.
METHODS: dict[str, Call] = {
    "Estimate.interval": Call({"level": 0.9}, function=TRACE_FOUND.interval),
    "LeafEstimate.interval": Call(
        {"level": 0.9}, function=next(iter(TRACE_FOUND.by_leaf.values())).interval
    ),
    "DiagonalEstimate.interval": Call({"level": 0.9}, function=DIAGONAL_FOUND.interval),
    "DiagonalEstimate.relative_error": Call({"level": 0.9}, function=DIAGONAL_FOUND.relative_error),
    "SampledEstimate.best_probes_per_draw": Call(
        {"cost": 1.0}, function=SAMPLED_FOUND.best_probes_per_draw
    ),
    "Influence.top": Call({"k": 2}, function=INFLUENCES.top),
    "Influence.bottom": Call({"k": 2}, function=INFLUENCES.bottom),
    "SelfInfluence.top": Call({"k": 2}, function=OWN_INFLUENCES.top),
    "Density.grid": Call({"points": 5}, function=DENSITY.grid),
    "Density.pdf": Call({"grid": B}, {"width": 0.1}, function=DENSITY.pdf),
    "Density.distance": Call({"level": 0.9}, function=DENSITY.distance),
    "Density.cdf_bounds": Call(
        {"x": B, "level": 0.9}, {"simultaneous": True}, function=DENSITY.cdf_bounds
    ),
    "Density.count_above": Call({"x": 2.5, "level": 0.9}, function=DENSITY.count_above),
    "Density.mean": Call(
        {"f": torch.exp}, {"smallest": 0.0, "largest": 9.0}, function=DENSITY.mean
    ),
    "Density.effective_dimension": Call({"damping": 0.5}, function=DENSITY.effective_dimension),
    **{
        f"{solver.__name__}.block": Call(
            {"matvec": matvec, "b": torch.stack([B, 2 * B])}, {"like": LIKE}, function=solver
        )
        for solver in (hf.cg, hf.minres)
    },
    "Blocks.inverse_matvec": Call(
        {"block": BLOCK, "damping": 0.5}, {"method": "exact"}, function=BLOCKS.inverse_matvec
    ),
    "Blocks.inverse": Call(
        {"damping": 0.5}, {"method": "exact"}, lambda mv: mv(BLOCK), BLOCKS.inverse
    ),
    "Blocks.power_matvec": Call(
        {"block": BLOCK, "exponent": -0.5, "damping": 0.5}, function=BLOCKS.power_matvec
    ),
    "Blocks.sample": Call({"k": 2, "damping": 0.5}, {"seed": 0}, function=BLOCKS.sample),
    "Blocks.logdet": Call({"damping": 0.5}, function=BLOCKS.logdet),
    "Block.inverse_matvec": Call(
        {"block": BLOCK["0.bias"], "damping": 0.5}, function=BLOCKS["0.bias"].inverse_matvec
    ),
    "Block.logdet": Call({"damping": 0.5}, function=BLOCKS["0.bias"].logdet),
    "NewtonOptimizer": Call(
        {"model": MODEL, "blocks": hf.kronecker.exact_blocks(hf.hvp, LOSS)},
        {"lr": 0.1, "alpha": 0.5, "solve": hf.optim.direct()},
        function=hf.optim.NewtonOptimizer,
    ),
    "Tracker.step": Call({"steps": 1}, {"lr": 0.1, "epoch": 0.5}, function=tracked_step),
    "plot.density": Call(
        {"density": DENSITY}, {"ax": None, "eigenvalues": PAIRS, "width": 0.1}, drawn,
        plot.density,
    ),
    "plot.eigenvalues": Call({"pairs": PAIRS}, {"ax": None}, drawn, plot.eigenvalues),
    "plot.history": Call(
        {"found": {0: PAIRS, 1: PAIRS}}, {"lr": 0.1, "against": "step", "ax": None}, drawn,
        plot.history,
    ),
    "plot.layers": Call(
        {"found": [TRACE_FOUND, OTHER_FOUND]}, {"level": 0.9, "quantity": "trace", "ax": None},
        drawn, plot.layers,
    ),
    "plot.blocks": Call({"found": {"a": DENSITY}}, {"ax": None}, drawn, plot.blocks),
    "plot.curves": Call({"found": LINE}, {"scale": "linear", "ax": None}, drawn, plot.curves),
    "plot.contours": Call(
        {"found": PLANE}, {"scale": "linear", "ax": None}, drawn, plot.contours
    ),
    "plot.surface": Call({"found": PLANE}, {"scale": "linear", "ax": None}, drawn, plot.surface),
}  # fmt: skip
OPERATOR = eigenthings.LambdaOperator(lambda v: MATRIX.float() @ v, 6)
BY_MODEL = {"model": MODEL, "dataloader": [BATCH]}


VECTOR = list(ONES.values())
FLAT = torch.cat([leaf.flatten() for leaf in VECTOR])
LEAVES = [leaf.clone().requires_grad_() for leaf in VECTOR]
ACTIVATIONS = pyhessian.hessian_with_activation(MODEL, CRITERION, BATCH)
ACTIVATIONS.insert_hook("2")


RISK = {
    "model_func": MODEL, "loss_func": nn.CrossEntropyLoss(), "params": list(MODEL.parameters()),
    "data": [BATCH],
}  # fmt: skip
LINEAR = TensorLinearOperator(MATRIX)


def columns(made: Any) -> Any:
    return made @ torch.eye(made.shape[1], dtype=D)


def repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with a seed of its own at each call, and without its files and lines."""

    def call(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng(), redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            return function(*args, **options)

    return call


METHODS |= {
    name: dataclasses.replace(call, function=repeated(call.function or value))
    for name, call in {
        "eigenthings.compute_hessian_eigenthings": Call(
            BY_MODEL | {"loss": CRITERION, "num_eigenthings": 1}, {"mode": "lanczos"},
            function=eigenthings.compute_hessian_eigenthings,
        ),
        "eigenthings.lanczos": Call(
            {"operator": OPERATOR, "num_eigenthings": 1, "which": "LM", "max_steps": 3},
            {"tol": 0.1, "num_lanczos_vectors": 6}, function=eigenthings.lanczos,
        ),
        "eigenthings.deflated_power_iteration": Call(
            {"operator": OPERATOR, "num_eigenthings": 1, "power_iter_steps": 5},
            {"power_iter_err_threshold": 0.1, "momentum": 0.0},
            function=eigenthings.deflated_power_iteration,
        ),
        "eigenthings.power_iteration": Call(
            {"operator": OPERATOR, "steps": 5, "error_threshold": 0.1},
            function=eigenthings.power_iteration,
        ),
        "hessianflow.get_eigen": Call(
            {"model": MODEL, "inputs": BATCH[0], "targets": BATCH[1], "criterion": CRITERION},
            {"maxIter": 4, "tol": 0.1}, function=hessianflow.get_eigen,
        ),
        "hessianflow.get_eigen_full_dataset": Call(
            BY_MODEL | {"criterion": CRITERION}, {"maxIter": 4, "tol": 0.1},
            function=hessianflow.get_eigen_full_dataset,
        ),
        "pyhessian.hessian": Call(
            {"model": MODEL, "criterion": CRITERION}, {"dataloader": [BATCH]},
            lambda made: made.trace(maxIter=2), pyhessian.hessian,
        ),
        "pyhessian.hessian.eigenvalues": Call(
            {"maxIter": 4, "tol": 0.1, "top_n": 1},
            function=pyhessian.hessian(MODEL, CRITERION, BATCH).eigenvalues,
        ),
        "pyhessian.hessian.trace": Call(
            {"maxIter": 4, "tol": 0.1}, function=pyhessian.hessian(MODEL, CRITERION, BATCH).trace
        ),
        "pyhessian.hessian.density": Call(
            {"iter": 4, "n_v": 1}, function=pyhessian.hessian(MODEL, CRITERION, BATCH).density
        ),
        "pyhessian.hessian.dataloader_hv_product": Call(
            {"v": VECTOR}, function=pyhessian.hessian(MODEL, CRITERION, BATCH).dataloader_hv_product
        ),
        "pyhessian.hessian_with_activation": Call(
            {"model": MODEL, "criterion": CRITERION}, {"data": BATCH}, lambda made: made.params,
            pyhessian.hessian_with_activation,
        ),
        "pyhessian.hessian_with_activation.insert_hook": Call(
            {"module_name": "2"}, then=lambda _: "chosen",
            function=pyhessian.hessian_with_activation(MODEL, CRITERION, BATCH).insert_hook,
        ),
        "pyhessian.hessian_with_activation.trace_activ": Call(
            {"maxIter": 4, "tol": 0.1}, function=ACTIVATIONS.trace_activ
        ),
        "pyhessian.hessian_with_activation.trace": Call(
            {"maxIter": 4, "tol": 0.1}, {"param_name": "weight"}, function=ACTIVATIONS.trace
        ),
        "pyhessian.group_product": Call(
            {"xs": VECTOR, "ys": VECTOR}, function=pyhessian.group_product
        ),
        "pyhessian.group_add": Call(
            {"update": VECTOR, "alpha": 2.0},
            function=lambda update, alpha: pyhessian.group_add(
                [leaf.clone() for leaf in VECTOR], update, alpha
            ),
        ),
        "pyhessian.group_add.params": Call(
            {"params": [leaf.clone() for leaf in VECTOR]},
            function=lambda params: pyhessian.group_add(params, VECTOR, 0.0),
        ),
        "pyhessian.normalization": Call({"v": VECTOR}, function=pyhessian.normalization),
        "pyhessian.orthnormal": Call(
            {"w": VECTOR, "v_list": [VECTOR]}, function=pyhessian.orthnormal
        ),
        "pyhessian.get_params_grad": Call({"model": MODEL}, function=pyhessian.get_params_grad),
        "pyhessian.hessian_vector_product": Call(
            {"gradsH": [3 * leaf for leaf in LEAVES], "params": LEAVES, "v": VECTOR},
            function=pyhessian.hessian_vector_product,
        ),
        "eigenthings.Operator": Call(
            {"size": 6}, then=lambda made: made.like(use_gpu=False), function=eigenthings.Operator
        ),
        "eigenthings.LambdaOperator": Call(
            {"apply_fn": lambda v: 2 * v, "size": 6}, then=lambda made: made.apply(B),
            function=eigenthings.LambdaOperator,
        ),
        "eigenthings.HVPOperator": Call(
            BY_MODEL | {"criterion": CRITERION}, {"max_possible_gpu_samples": 2},
            lambda made: made.apply(FLAT), eigenthings.HVPOperator,
        ),
        "eigenthings.HVPOperator.apply": Call(
            {"vec": FLAT},
            function=lambda vec: eigenthings.HVPOperator(MODEL, [BATCH], CRITERION).apply(vec),
        ),
        "curvlinops.GGNLinearOperator": Call(
            RISK, {"num_data": 8, "block_sizes": [2, 2], "batch_size_fn": len, "mc_samples": 0},
            columns, curvlinops.GGNLinearOperator,
        ),
        "curvlinops.KFACLinearOperator": Call(
            RISK, {"fisher_type": "mc", "mc_samples": 2, "kfac_approx": "expand", "num_data": 8},
            columns, curvlinops.KFACLinearOperator,
        ),
        "curvlinops.KFACInverseLinearOperator": Call(
            {"A": curvlinops.KFACLinearOperator(*RISK.values()), "damping": 0.1},
            {"use_heuristic_damping": False, "min_damping": 1e-8, "use_exact_damping": True},
            columns, curvlinops.KFACInverseLinearOperator,
        ),
        "curvlinops.JacobianLinearOperator": Call(
            {name: RISK[name] for name in ("model_func", "params", "data")},
            {"check_deterministic": True}, columns, curvlinops.JacobianLinearOperator,
        ),
        "curvlinops.CGInverseLinearOperator": Call(
            {"A": LINEAR}, {"tolerance": 0.1, "max_iter": 9, "initial_guess": LIKE}, columns,
            curvlinops.CGInverseLinearOperator,
        ),
        "curvlinops.NeumannInverseLinearOperator": Call(
            {"A": LINEAR, "num_terms": 3, "scale": 0.1, "check_nan": True}, {}, columns,
            curvlinops.NeumannInverseLinearOperator,
        ),
        "curvlinops.SubmatrixLinearOperator": Call(
            {"A": LINEAR, "row_idxs": [0, 1], "col_idxs": [2]}, {}, columns,
            curvlinops.SubmatrixLinearOperator,
        ),
        "curvlinops.product": Call({"X": LIKE}, function=lambda X: LINEAR @ X),
        "curvlinops.multiple": Call(
            {"scalar": 2.0}, then=columns, function=lambda scalar: LINEAR * scalar
        ),
        "curvlinops.hutchinson_trace": Call(
            {"A": LINEAR, "num_matvecs": 3, "distribution": "normal"},
            function=curvlinops.hutchinson_trace,
        ),
        "curvlinops.xdiag": Call({"A": LINEAR, "num_matvecs": 4}, function=curvlinops.xdiag),
        "curvlinops.hutchinson_squared_fro": Call(
            {"A": LINEAR, "num_matvecs": 4}, function=curvlinops.hutchinson_squared_fro
        ),
        "curvlinops.lanczos_approximate_log_spectrum": Call(
            {"A": LINEAR, "ncv": 3, "num_points": 9, "num_repeats": 1, "kappa": 3.0},
            {"boundaries": (1.0, 6.0), "margin": 0.1, "boundaries_tol": 0.1, "epsilon": 1e-3},
            function=curvlinops.lanczos_approximate_log_spectrum,
        ),
        "hessianflow.progress_bar": Call(
            {"current": 0, "total": 1, "msg": "loss"}, then=str, function=hessianflow.progress_bar
        ),
        "pyhessian.density_generate": Call(
            {"eigenvalues": [[0.0, 1.0]], "weights": [[0.5, 0.5]], "num_bins": 9},
            {"sigma_squared": 1e-2, "overhead": 0.01}, function=pyhessian.density_generate,
        ),
    }.items()
}  # fmt: skip
if find_spec("matplotlib") is None:
    METHODS = {name: call for name, call in METHODS.items() if not name.startswith("plot.")}

# What goes, or whose value goes, into another function of the caller's, which may fail on it.
OF_CALLER = {
    ("supervised", "model_fn"), ("composed", "outputs"), ("composed", "targets"),
    ("recomputed", "fn"), ("tracked", "compose"), ("fgsm", "batch"), ("pgd", "batch"),
    ("hessianflow.get_eigen", "inputs"), ("hessianflow.get_eigen", "targets"),
    ("eigenthings.LambdaOperator", "apply_fn"), ("pyhessian.hessian_with_activation", "data"),
}  # fmt: skip
# They need a mesh or a file, and are right where they refuse what stands in its place.
REFUSED = {"load", "read", "sharded"}

POOL: list[Callable[[], Any]] = [
    lambda: None, lambda: "abc", lambda: "", lambda: b"bytes", lambda: math.nan, lambda: math.inf,
    lambda: -math.inf, lambda: -1, lambda: 0, lambda: -2.5, lambda: 2.5, lambda: 10**30,
    lambda: 10**400, lambda: 1e300, lambda: True, lambda: 1j, list, lambda: (), dict,
    lambda: set(), lambda: {1, 2}, lambda: [1, 2], lambda: ["a", None], lambda: {"a": 1},
    lambda: {"a": {}}, lambda: [None], lambda: range(3), lambda: object(), lambda: slice(None),
    lambda: Ellipsis, lambda: NotImplemented, lambda: np, lambda: int, lambda: Exception("x"),
    lambda: (i for i in range(3)), lambda: iter([BATCH]), lambda: MODEL.parameters(),
    lambda: np.float32("nan"), lambda: np.int64(-3), lambda: np.str_("LA"), lambda: np.bool_(True),
    lambda: np.zeros(3), lambda: np.zeros((6, 6)), lambda: np.array(None), lambda: np.array(2.5),
    lambda: np.array(["LM", "LA"]), lambda: np.datetime64("2020-01-01"), lambda: np.zeros(0),
    lambda: scipy.sparse.eye_array(6), lambda: torch.tensor(3), lambda: torch.tensor(-1.0),
    lambda: torch.tensor(math.nan), lambda: torch.tensor(True), lambda: torch.tensor(1j),
    lambda: torch.zeros(6), lambda: torch.zeros(6, dtype=torch.int64), lambda: torch.zeros(0),
    lambda: torch.zeros(6, dtype=torch.complex128), lambda: torch.zeros(6, dtype=torch.bool),
    lambda: torch.zeros(6, dtype=D, device="meta"), lambda: torch.eye(6).to_sparse(),
    lambda: torch.full((6,), math.nan, dtype=D), lambda: torch.zeros(5, dtype=D),
    lambda: torch.zeros(6, 6, dtype=D), lambda: torch.zeros(6, 5, dtype=D),
    lambda: torch.ones(6, dtype=torch.bfloat16), lambda: torch.ones(6, dtype=D).requires_grad_(),
    lambda: {"a": torch.zeros(6, dtype=torch.int64)}, lambda: {"a": torch.zeros(3, dtype=D)},
    lambda: [torch.zeros(3, dtype=D)] * 2, lambda: {0: torch.zeros(6, dtype=D)}, lambda: PARAMS,
    lambda: {**PARAMS, "extra": torch.zeros(1, dtype=D)}, lambda: {"0.weight": PARAMS["0.weight"]},
    lambda: MODEL, lambda: nn.Linear, lambda: nn.Sequential(), lambda: nn.Identity(),
    lambda: nn.CrossEntropyLoss(), lambda: LOSS, lambda: hf.hvp, lambda: hf.hvp(LOSS),
    lambda: hf.hvp(LOSS)(PARAMS, BATCH), lambda: hf.lanczos, lambda: hf.dense(MATRIX),
    lambda: hf.hutchinson(matvec, LIKE, seed=0, max_matvecs=2), lambda: BATCH, lambda: [BATCH],
    lambda: [BATCH[0]], lambda: torch.optim.SGD(MODEL.parameters(), lr=0.1), lambda: len,
    lambda: lambda: None, lambda: lambda a: a, lambda: lambda a: None,
    lambda: lambda a: "text", lambda: lambda a: a.numpy() if isinstance(a, Tensor) else 0,
    lambda: lambda a, b: a, lambda: lambda a, b: torch.zeros(()), lambda: lambda a, b, c: a,
    lambda: lambda *a: None, lambda: lambda *a: math.nan, lambda: lambda *a, **k: torch.tensor(1.0),
    lambda: torch.float16, lambda: torch.int32, lambda: np.float32, lambda: torch.device("meta"),
    lambda: Path("no/such/folder/file"), lambda: types.SimpleNamespace(values=1, vectors=2),
]  # fmt: skip


def equivalents(valid: Any) -> list[Any]:
    """The same scalar as one of NumPy or torch."""
    if isinstance(valid, bool):
        return [np.bool_(valid), torch.tensor(valid), np.array(valid)]
    if isinstance(valid, int):
        return [np.int64(valid), np.int32(valid), torch.tensor(valid), np.array(valid)]
    if isinstance(valid, float):
        return [np.float64(valid), torch.tensor(valid, dtype=D), np.array(valid)]
    return [np.str_(valid)] if isinstance(valid, str) else []


class TooLongError(BaseException):
    """A call has taken more processor time than it may."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def called(name: str, changed: dict[str, Any]) -> Any:
    """What the call gives with some arguments changed."""
    call = (CALLS | METHODS)[name]
    args = [changed.get(arg, given) for arg, given in call.args.items()]
    options = {
        option: changed.get(option, given)
        for option, given in call.options.items()
        # An option that is None in a valid call is left out.
        if given is not None or option in changed
    }
    function = call.function or FUNCTIONS[name]
    return call.then(function(*args, **options))


def plain(found: Any) -> Any:
    """The numbers of a result."""
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        fields = [item.name for item in dataclasses.fields(found)]
        skipped = {"versions", "choices", "seconds", "outputs", "criterion"}
        return {name: plain(getattr(found, name)) for name in fields if name not in skipped}
    if isinstance(found, dict):
        return {name: plain(one) for name, one in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(one) for one in found]
    if isinstance(found, Tensor):
        return found.detach().double().tolist()
    if isinstance(found, np.ndarray):
        return found.tolist()
    return found if isinstance(found, (int, float, str, bool)) else type(found).__name__


def outcome(name: str, changed: dict[str, Any]) -> tuple[Any, str]:
    """What the call gives, and what is wrong with how it ends."""
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return called(name, changed), ""
    except TooLongError:
        return None, f"no end within {SECONDS} s"
    except ERRORS as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if Path(frame.filename).is_relative_to(HOME) and str(error):
            return error, ""
        return None, f"{type(error).__name__} from {frame.filename}:{frame.lineno}: {error}"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def wrong(name: str, argument: str, pick: random.Random) -> str:
    """What is wrong with a call with one random argument; empty if nothing is."""
    call = (CALLS | METHODS)[name]
    valid = (call.args | call.options)[argument]
    alike = equivalents(valid)
    if alike and pick.random() < 0.3:
        given = pick.choice(alike)
        found, fault = outcome(name, {argument: given})
        # Texts, because NaN differs from itself.
        if (
            not fault
            and name not in REFUSED
            and str(plain(found)) != str(plain(outcome(name, {})[0]))
        ):
            fault = f"another value than with {valid!r}: {found!r}"
    else:
        given = pick.choice(POOL)()
        found, fault = outcome(name, {argument: given})
    shown = repr(given).replace("\n", " ")
    if not fault or (name, argument) in OF_CALLER:
        return ""
    return f"{name}({argument}={shown[:80]}): {fault}"


def fuzz(seed: int, count: int, calls: dict[str, Call] = CALLS) -> list[str]:
    pick = random.Random(seed)
    arguments = [
        (name, argument) for name, call in calls.items() for argument in call.args | call.options
    ]
    faults = []
    for _ in range(count):
        if fault := wrong(*pick.choice(arguments), pick):
            faults.append(fault)
    return faults


@pytest.fixture(autouse=True)
def _no_figures_stay_open() -> Iterator[None]:
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


def test_every_public_function_is_called() -> None:
    assert FUNCTIONS.keys() == CALLS.keys()
    for name, call in CALLS.items():
        parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
        options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert options <= call.options.keys() | {"blocks"}, name
        wrapped = FUNCTIONS[name].__code__.co_filename.endswith("options/door.py")
        # A product of one vector, or an inner product, is too short for it.
        assert wrapped or name in ("apply", "inner")


@pytest.mark.parametrize("library", [curvlinops, eigenthings, hessianflow, pyhessian])
def test_every_function_of_a_drop_in_replacement_is_checked(library: types.ModuleType) -> None:
    for name in library.__all__:
        value = getattr(library, name)
        made = value.__init__ if inspect.isclass(value) else value
        # `hessian_with_activation` passes its arguments on to the checked `MeanLoss`.
        if "args" not in inspect.signature(made).parameters:
            assert made.__code__.co_filename.endswith("options/door.py"), name


@pytest.mark.parametrize("name", [name for name in CALLS | METHODS if name not in REFUSED])
def test_the_call_that_is_changed_is_valid(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert called(name, {}) is not None


def test_a_few_random_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not fuzz(seed=1, count=200)


def test_a_few_random_arguments_of_methods_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not fuzz(seed=3, count=300, calls=METHODS)


@pytest.mark.slow
def test_a_thousand_random_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not fuzz(seed=2, count=1000)
