"""Stability limit of an optimiser's next step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hessfunc.algorithms.frank_wolfe import Norm
from hessfunc.display import VECTORS, Displayed
from hessfunc.fingerprints import combined, with_fingerprint
from hessfunc.optim.stability.norms import Preconditioner
from hessfunc.options import described, validated
from hessfunc.transforms.matvecs.arithmetic import precondition
from hessfunc.trees import Matvec, Tree


class UnknownStability(ValueError):  # noqa: N818
    """The next step of a known optimiser has no stability limit."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Stability(Displayed):
    """Sharpness up to which the steps of an optimiser are stable on a quadratic.

    The sharpness is the largest eigenvalue of P^-1/2 (H + W) P^-1/2, or the maximum of
    d'(H + W)d over the unit ball of a norm. Here H is the Hessian, P the preconditioner and W the
    weight decay that is a part of the gradient. Make one by hand for an optimiser that `stability`
    does not know.

    Attributes:
        threshold: Largest stable sharpness.
        preconditioner: Preconditioner P of each parameter by name, a tensor for a diagonal one;
            None for the identity.
        norm: Norm whose steepest descent is the step, as in `generalized_sharpness`; None for a
            preconditioned step.
        weight_decay: Diagonal of W, a number for each parameter by name; None for 0.
        optimizer: Name of the optimiser.

    Raises:
        ValueError: If the threshold or the preconditioner is not positive, or if there are both a
            preconditioner and a norm.
        TypeError: If the preconditioner is not a dict of tensors.
    """

    threshold: float
    preconditioner: Mapping[str, Tensor | Preconditioner] | None = field(
        default=None, metadata=VECTORS
    )
    norm: Norm | None = None
    weight_decay: Mapping[str, float] | None = None
    optimizer: str = field(default="own", kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold}: it must be positive and finite")
        if self.norm is not None and self.preconditioner is not None:
            raise ValueError("a step has a preconditioner or a norm: pass one of them")
        if self.preconditioner is None:
            return
        if not isinstance(self.preconditioner, Mapping):
            raise TypeError(
                f"preconditioner must be a dict, not {described(self.preconditioner)}: pass a "
                "tensor for the name of each parameter"
            )
        for name, factor in self.preconditioner.items():
            entries = factor.entries if isinstance(factor, Preconditioner) else factor
            if not isinstance(entries, Tensor):
                raise TypeError(
                    f"preconditioner[{name!r}] must be a tensor, not {described(entries)}: pass "
                    "the diagonal of P, with the shape of the parameter"
                )
            if not bool((entries > 0).all()):
                raise ValueError(
                    f"the preconditioner of {name!r} has an entry that is not positive: add a "
                    "damping, such as `eps=1e-8` of the optimiser"
                )

    def _headline(self) -> dict[str, object]:
        step = "normed" if self.norm else "preconditioned" if self.preconditioner else "plain"
        edge = {} if self.edge is None else {"edge": f"{self.edge:.6g}"}
        return {
            "threshold": f"{self.threshold:.6g}",
            **edge,
            "step": step,
            "optimizer": self.optimizer,
        }

    @property
    def edge(self) -> float | None:
        """Largest stable eigenvalue of H itself, or None if P or a norm changes the eigenvalues."""
        decays = set((self.weight_decay or {"": 0.0}).values())
        if self.norm is not None or self.preconditioner is not None or len(decays) > 1:
            return None
        return self.threshold - decays.pop()

    @validated
    def preconditioned(self, matvec: Matvec, /) -> Matvec:
        """Return the matvec of P^-1/2 (H + W) P^-1/2, given that of H.

        With a norm, P is the identity, and `generalized_sharpness` of the product with ``norm`` is
        the sharpness to compare with ``threshold``. The vectors are dicts of parameters.
        """

        shifted = self._shifted(matvec)
        if self.preconditioner is None:
            return shifted
        factors = dict(self.preconditioner)
        if not any(isinstance(factor, Preconditioner) for factor in factors.values()):
            return precondition(shifted, factors)

        def half(block: Tree) -> Tree:
            return {name: _half(factors[name], leaf) for name, leaf in block.items()}

        return with_fingerprint(
            lambda block: half(shifted(half(block))), lambda: combined([shifted])
        )

    def _shifted(self, matvec: Matvec) -> Matvec:
        """Return the matvec of H + W."""
        decays = self.weight_decay
        if decays is None:
            return matvec

        def product(block: Tree) -> Tree:
            images = matvec(block)
            return {name: image + decays[name] * block[name] for name, image in images.items()}

        if (ranks := getattr(matvec, "ranks", None)) is not None:
            vars(product)["ranks"] = ranks
        return with_fingerprint(product, lambda: combined([matvec]))


def _half(factor: Tensor | Preconditioner, block: Tensor) -> Tensor:
    """Return the products of P^-1/2 with a block."""
    known = factor if isinstance(factor, Preconditioner) else Preconditioner(factor)
    return known.power(block, -0.5)
