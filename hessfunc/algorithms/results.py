"""What every algorithm returns: what was found, how sure, what it cost, and why it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hessfunc.algorithms.quantiles import student_quantile
from hessfunc.trees import Tree, flatten, leaves

__all__ = ["Density", "Eigenpairs", "Estimate", "Result", "load", "pool", "versions"]


@cache
def versions() -> dict[str, str]:
    """The versions under which results are made."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": torch.__version__, "numpy": np.__version__}
    try:
        found["hessfunc"] = version("hessfunc")
    except PackageNotFoundError:
        found["hessfunc"] = "not installed"
    return found


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every result tells.

    Attributes:
        matvecs: products with one vector that were spent.
        passes: calls of the matvec; each serves a whole block.
        reason: why the run stopped, in words.
        seed: with which the run can be repeated.
        versions: of the packages that made it.
    """

    matvecs: int
    passes: int
    reason: str
    seed: int | None
    versions: dict[str, str] = field(default_factory=versions)

    kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Result.kinds[cls.__name__] = cls

    def save(self, path: str | os.PathLike[str], /) -> None:
        """Write to one ``.npz`` file, whole or not at all; `load` reads it without pickle.

        Trees are read back as (nested) dicts.
        """
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        plain: dict[str, Any] = {"kind": type(self).__name__}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor) or _is_tree(value):
                found, structure = flatten(value)
                paths = [list(map(str, path)) for path in structure.paths()]
                plain[item.name] = {"paths": paths}
                for i, leaf in enumerate(found):
                    # NumPy has no bfloat16; float32 holds it exactly.
                    plain_leaf = leaf.float() if leaf.dtype == torch.bfloat16 else leaf
                    arrays[f"{item.name}/{i}"] = plain_leaf.detach().cpu().numpy()
            else:
                plain[item.name] = {"value": value}
        arrays["result"] = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
        _write_whole(Path(path), arrays)


def _is_tree(value: Any) -> bool:
    found = leaves(value)
    return bool(found) and all(isinstance(leaf, Tensor) for leaf in found)


def _write_whole(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    part.replace(path)


def load(path: str | os.PathLike[str], /) -> Result:
    """A result that was written by ``save``.

    Raises:
        ValueError: the file holds no result.
    """
    with np.load(path, allow_pickle=False) as file:
        if "result" not in file:
            raise ValueError(f"{os.fspath(path)} holds no result of hessfunc")
        plain = json.loads(file["result"].tobytes())
        kind = Result.kinds[plain.pop("kind")]
        values: dict[str, Any] = {}
        for name, item in plain.items():
            if "value" in item:
                values[name] = item["value"]
            else:
                found = [torch.from_numpy(file[f"{name}/{i}"]) for i in range(len(item["paths"]))]
                values[name] = _nested(item["paths"], found)
    return kind(**values)


def _nested(paths: list[list[str]], found: list[Tensor]) -> Tree:
    if paths == [[]]:
        return found[0]
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, found, strict=True):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


@dataclass(frozen=True, kw_only=True)
class Eigenpairs(Result):
    """Eigenvalues with vectors, in the order that the algorithm states.

    Attributes:
        values: Ritz values, float64 ``(k,)``.
        vectors: a block of k orthonormal vectors.
        residuals: ``|A v_i - values_i v_i|``, float64 ``(k,)``; measured with A at the end.
        converged: whether the residual is within the stated tolerance, bool ``(k,)``.
        largest: the largest absolute Ritz value that was seen, the scale of rounding.
    """

    values: Tensor
    vectors: Tree
    residuals: Tensor
    converged: Tensor
    largest: float

    @property
    def intervals(self) -> Tensor:
        """``[value - residual, value + residual]``, ``(k, 2)``: some eigenvalue lies in each.

        Widened by the rounding of the products. Nothing is promised about the index of that
        eigenvalue.
        """
        radius = self.residuals + rounding(
            max(torch.finfo(leaf.dtype).eps for leaf in leaves(self.vectors)), self.largest
        )
        return torch.stack([self.values - radius, self.values + radius], dim=1)


def rounding(eps: float, largest: float, /) -> float:
    """The size of the rounding error of a product with a unit vector.

    Args:
        eps: of the dtype in which products are made.
        largest: the largest absolute eigenvalue, as far as it is known.
    """
    return 30 * eps * largest


@dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """A mean of independent samples.

    Attributes:
        value: the estimate.
        stderr: its standard error.
        samples: float64 ``(p,)``, one a probe.
        by_leaf: the part of each leaf; the parts sum to the value.
    """

    value: float
    stderr: float
    samples: Tensor
    by_leaf: dict[str, float]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided Student interval at this level."""
        if not 0 < level < 1:
            raise ValueError(f"level={level}: a probability between 0 and 1")
        half = student_quantile((1 + level) / 2, len(self.samples) - 1) * self.stderr
        return self.value - half, self.value + half


def narrow_enough(estimate: Estimate, rtol: float | None, atol: float | None, /) -> str | None:
    """Why an estimate need not be refined, in words, or None."""
    low, high = estimate.interval()
    if (high - low) / 2 <= max((rtol or 0.0) * abs(estimate.value), atol or 0.0):
        return "converged: the half-width of the 95 % interval is within the tolerance"
    return None


def pool(estimates: Sequence[Estimate], weights: Sequence[float] | None = None, /) -> Estimate:
    """The weighted mean of independent estimates, such as one for each of several batches.

        value = sum_b w_b value_b / sum_b w_b,  stderr^2 = sum_b w_b^2 stderr_b^2 / (sum_b w_b)^2

    Args:
        estimates: of different batches or of different probes, with the same leaves or none.
        weights: what each counts, such as the examples of its batch; equal by default.

    Raises:
        ValueError: there is no estimate, weights do not match, or two estimates share a seed and
            so their probes.
    """
    weights = [1.0] * len(estimates) if weights is None else list(weights)
    if not estimates or len(weights) != len(estimates):
        raise ValueError(f"{len(estimates)} estimates and {len(weights)} weights: pass one each")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights={weights}: at least 0, and not all 0")
    seeds = [estimate.seed for estimate in estimates if estimate.seed is not None]
    if len(set(seeds)) < len(seeds):
        raise ValueError("two estimates share a seed, so they are not independent: vary it")
    share = [w / sum(weights) for w in weights]
    by_leaf: dict[str, float] = {}
    for s, estimate in zip(share, estimates, strict=True):
        for name, part in estimate.by_leaf.items():
            by_leaf[name] = by_leaf.get(name, 0.0) + s * part
    return Estimate(
        value=sum(s * e.value for s, e in zip(share, estimates, strict=True)),
        stderr=math.hypot(*(s * e.stderr for s, e in zip(share, estimates, strict=True))),
        samples=torch.cat([e.samples for e in estimates]),
        by_leaf=by_leaf,
        matvecs=sum(e.matvecs for e in estimates),
        passes=sum(e.passes for e in estimates),
        reason=f"pooled from {len(estimates)} estimates",
        seed=None,
    )


@dataclass(frozen=True, kw_only=True)
class Density(Result):
    """A spectral density: a mixture of point masses for each probe.

    Attributes:
        nodes: Ritz values, ascending, float64 ``(p, m)``.
        weights: of the nodes, float64 ``(p, m)``; they sum to 1 for each probe. A probe that
            ended early is filled up with nodes of weight 0.
        n: the dimension of the matrix.
    """

    nodes: Tensor
    weights: Tensor
    n: int

    @property
    def width(self) -> float:
        """The default smoothing width: 1 % of the range of the nodes."""
        spread = float(self.nodes.max() - self.nodes.min())
        return 0.01 * (spread or float(self.nodes.abs().max()) or 1.0)

    def grid(self, points: int = 1000) -> Tensor:
        """Evenly spaced points ``(points,)`` that cover the smoothed density."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return torch.linspace(
            low - 5 * self.width, high + 5 * self.width, points, dtype=torch.float64
        )

    def pdf(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The density smoothed by a Gaussian of standard deviation ``width``, at the grid's points.

            pdf(x) = mean over probes of sum_j weights_j N(x; nodes_j, width^2)

        Args:
            grid: points, any shape.
            width: in units of the eigenvalues; by default 1 % of the range of the nodes.
        """
        width = self.width if width is None else width
        if not width > 0:
            raise ValueError(f"width={width}: a positive number")
        z = (grid.to(torch.float64)[..., None] - self.nodes.flatten()) / width
        mass = self.weights.flatten() / len(self.nodes)
        return (torch.exp(-0.5 * z.square()) @ mass) / (width * math.sqrt(2 * math.pi))

    def cdf_bounds(self, x: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds of the share of eigenvalues up to each x: ``(lower, upper)``, shaped like x.

        The distribution function of each probe is enclosed between its nodes without error
        (Chebyshev, Markov, Stieltjes). A probe on the sphere puts a Beta distributed share, of
        variance 2 F (1 - F) / (n + 2), on the eigenvalues up to x; solved for F this gives an
        interval from a single probe on. Pointwise: it holds at each x with probability ``level``,
        not at all of them at once.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: a probability between 0 and 1")
        points = x.to(torch.float64)[..., None, None]
        before = self.nodes <= points
        cumulated = self.weights.cumsum(1)
        share = torch.where(before, self.weights, 0.0).sum(-1)
        last = torch.where(before, cumulated, 0.0).amax(-1)
        # Up to the node before x, and up to the node after it.
        at = (before.sum(-1) - 1).clamp_min(0)
        probe = torch.arange(len(self.nodes)).expand(at.shape)
        lower = (share - self.weights[probe, at] * (before.any(-1))).clamp_min(0)
        following = (at + before.any(-1)).clamp_max(self.nodes.shape[1] - 1)
        upper = torch.maximum(cumulated[probe, following], last).clamp_max(1)
        z = NormalDist().inv_cdf((1 + level) / 2)
        excess = z**2 * 2 / (len(self.nodes) * (self.n + 2))
        return _wilson(lower.mean(-1), excess)[0], _wilson(upper.mean(-1), excess)[1]

    def count_above(self, x: float, level: float = 0.95) -> tuple[int, int]:
        """An interval of the number of eigenvalues above x.

        From `cdf_bounds`, and from the Ritz values, which interlace: there are at least as many
        eigenvalues above x as Ritz values of one probe, and likewise below.
        """
        lower, upper = self.cdf_bounds(torch.tensor(x), level)
        mass = self.weights > 0
        ritz_above = int(((self.nodes > x) & mass).sum(1).max())
        ritz_below = int(((self.nodes <= x) & mass).sum(1).max())
        low = max(ritz_above, math.ceil(self.n * (1 - float(upper)) - 1e-9))
        high = min(self.n - ritz_below, math.floor(self.n * (1 - float(lower)) + 1e-9))
        return low, max(low, high)


def _wilson(share: Tensor, excess: float) -> tuple[Tensor, Tensor]:
    """The F at which ``(share - F)^2 = excess F (1 - F)``."""
    centre = (share + excess / 2) / (1 + excess)
    half = (excess * (share * (1 - share) + excess / 4)).sqrt() / (1 + excess)
    rounding = 1e-12
    return (centre - half - rounding).clamp(0, 1), (centre + half + rounding).clamp(0, 1)
