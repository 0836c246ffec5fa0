"""Kronecker-factored approximations of the Fisher and Gauss-Newton matrix as linear operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hessfunc.compat.curvlinops.arguments import CHECKS
from hessfunc.compat.curvlinops.blocks import inverse, scaled
from hessfunc.compat.curvlinops.curvature import CurvatureLinearOperator
from hessfunc.compat.curvlinops.empirical import empirical
from hessfunc.compat.curvlinops.inverse import Inverse
from hessfunc.compat.curvlinops.matrices import SEED
from hessfunc.compat.curvlinops.matvecs import block_of, columns
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.composite_blocks import Joint
from hessfunc.kronecker.evaluation import Bias
from hessfunc.kronecker.factored_blocks import Kronecker
from hessfunc.kronecker.factors import ekfac, kfac, kflr
from hessfunc.kronecker.propagate import BlockCurvature
from hessfunc.losses import composed
from hessfunc.options import validated
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.trees import Matvec

_Kind = TypeVar("_Kind", bound=StrEnum)


class FisherType(StrEnum):
    """Kind of the output factors.

    Attributes:
        TYPE2: Exact Hessian of the loss with respect to the outputs.
        MC: Gradients for targets drawn from the model's own prediction.
        EMPIRICAL: Gradients for the targets of the data.
        FORWARD_ONLY: Identity matrices.
    """

    TYPE2 = "type-2"
    MC = "mc"
    EMPIRICAL = "empirical"
    FORWARD_ONLY = "forward-only"


class KFACType(StrEnum):
    """Treatment of positions that share a weight.

    Attributes:
        EXPAND: Positions are treated as examples.
        REDUCE: Inputs are averaged over positions.
    """

    EXPAND = "expand"
    REDUCE = "reduce"


class Value(Tensor):
    """Scalar that may also be called, and then returns itself.

    The trace and the other numbers of a KFAC matrix are properties in curvlinops 3.0, and methods
    in later versions.
    """

    def __call__(self) -> Tensor:
        return self.as_subclass(Tensor)


class KFACLinearOperator(CurvatureLinearOperator):
    """Kronecker-factored approximation (KFAC), by `kfac` or `kflr`.

        G = A (x) B,    A = mean_n x x',    B = c sum_n g g'

    The factors of the data set are computed at the first use, at the parameters of that time.

    Args:
        model_func: Module, of which `kflr` lists the supported layers.
        loss_func: Loss, as in `FisherMCLinearOperator`.
        params: List of some parameters of the module, or dict of its parameters by name.
        data: Batches ``(X, y)`` that can be read several times.
        progressbar: Ignored.
        check_deterministic: Whether to evaluate the loss of the data twice, and to raise an error
            if the values differ.
        seed: Seed of the draws for ``fisher_type="mc"``.
        fisher_type: `FisherType` or its value.
        mc_samples: Number of draws of each target.
        kfac_approx: `KFACType` or its value.
        num_per_example_loss_terms: Ignored: the terms are counted.
        separate_weight_and_bias: Whether the weight and the bias of a layer have separate blocks,
            or a joint one, whose input factor has a last input of 1.
        num_data: Number of examples by which a mean loss is divided, instead of that of the data.
        batch_size_fn: Function of X that returns the number of examples of a batch.

    Raises:
        ValueError: If an option is unknown.
        NotImplementedError: If ``model_func`` is a function.
    """

    _by_draws: Callable[..., BlockCurvature] = staticmethod(kfac)
    _exactly: Callable[..., BlockCurvature] = staticmethod(kflr)
    _without_gradients: Callable[..., BlockCurvature] = staticmethod(
        partial(kfac, fisher="forward-only")
    )

    @validated(**CHECKS)
    def __init__(
        self,
        model_func: nn.Module,
        loss_func: Callable[[Any, Any], Tensor],
        params: Sequence[Tensor] | Mapping[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = SEED,
        fisher_type: str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        backend: str = "hooks",
    ) -> None:
        if not isinstance(model_func, nn.Module):
            raise NotImplementedError(
                "Kronecker factors need the modules of a model: pass a module as model_func"
            )
        self._fisher_type = _member("fisher_type", FisherType, fisher_type)
        self._kfac_approx = _member("kfac_approx", KFACType, kfac_approx)
        if self._fisher_type is not FisherType.MC and mc_samples != 1:
            raise ValueError(
                f"mc_samples={mc_samples} needs fisher_type='mc', but fisher_type="
                f"{self._fisher_type.value!r}: leave mc_samples out"
            )
        self._seed, self._mc_samples = seed, mc_samples
        self._bias: Bias = "apart" if separate_weight_and_bias else "joint"
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )

    def compute_kronecker_factors(self) -> None:
        """Compute the factors at the current parameters."""
        self.__dict__.pop("blocks", None)
        _ = self.blocks

    @cached_property
    def blocks(self) -> Blocks:
        """Diagonal blocks of the data set, by the name of the parameter."""
        mean = over_batches(self._of_batch(), weight=self.average().weight)
        blocks = mean(self.params, self._data)
        assert isinstance(blocks, Blocks)
        if self._num_data is None:
            return blocks
        counted = sum(map(self.size, self._data)) / self._num_data
        is_identity = self._fisher_type is FisherType.FORWARD_ONLY
        return scaled(blocks, left=1.0 if is_identity else self.share, right=counted)

    def _of_batch(self) -> BlockCurvature:
        """Return the curvature function of one batch."""
        loss, model = self.loss, self._model_func
        options: Any = {"sharing": self._kfac_approx.value, "bias": self._bias}
        match self._fisher_type:
            case FisherType.TYPE2:
                return self._exactly(loss, model, **options)
            case FisherType.EMPIRICAL:
                criterion = empirical(self.criterion)
                of_data = composed(self.outputs, criterion, targets=self._targets)
                return self._exactly(of_data, model, **options)
            case FisherType.FORWARD_ONLY:
                return self._without_gradients(loss, model, **options)
            case _:
                draws = {"samples": self._mc_samples, "seed": self._seed}
                return self._by_draws(loss, model, **draws, **options)

    def _matvec(self) -> Matvec:
        return self.blocks

    def inverse(
        self,
        damping: float | tuple[float, float] = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> KFACInverseLinearOperator:
        """Return the inverse with damping, as `KFACInverseLinearOperator` does."""
        return KFACInverseLinearOperator(
            self, damping, use_heuristic_damping, min_damping, use_exact_damping
        )

    @property
    def _mapping(self) -> dict[str, dict[str, int]]:
        """Positions of the parameters of each module, by their names in the module."""
        modules: dict[str, dict[str, int]] = {}
        for position, name in enumerate(self._params):
            module, _, own = name.rpartition(".")
            modules.setdefault(module, {})[own] = position
        return modules

    @property
    def _gradient_covariances(self) -> dict[str, Tensor]:
        """Output factor B of each module."""
        return {_module(name): _single(block.left) for name, block in self._kronecker()}

    @property
    def _input_covariances(self) -> dict[str, Tensor]:
        """Input factor A of each module with a weight."""
        return {
            _module(name): _single(block.right)
            for name, block in self._kronecker()
            if len(block.shape) > 1
        }

    def _kronecker(self) -> list[tuple[str, Kronecker]]:
        blocks = ((n, b.inner if isinstance(b, Joint) else b) for n, b in self.blocks.items())
        return [(n, b) for n, b in blocks if isinstance(b, Kronecker)]

    def _value(self, number: float | Tensor) -> Value:
        like = next(iter(self._params.values())).detach()
        return like.new_tensor(float(number)).as_subclass(Value)

    @property
    def trace(self) -> Value:
        """Trace of the matrix."""
        return self._value(self.blocks.trace())

    @property
    def logdet(self) -> Value:
        """Logarithm of the determinant, minus infinity for a singular matrix."""
        return self._value(self.blocks.eigenvalues().double().log().sum())

    @property
    def det(self) -> Value:
        """Determinant of the matrix."""
        return self._value(self.blocks.eigenvalues().double().prod())

    @property
    def frobenius_norm(self) -> Value:
        """Frobenius norm of the matrix."""
        return self._value(self.blocks.norm())


class EKFACLinearOperator(KFACLinearOperator):
    """KFAC with corrected eigenvalues (EKFAC), by `ekfac`. Arguments are those of KFAC."""

    _by_draws = staticmethod(ekfac)
    _exactly = staticmethod(ekfac)

    def inverse(
        self,
        damping: float | tuple[float, float] = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = True,
        retry_double_precision: bool = True,
    ) -> KFACInverseLinearOperator:
        """Return the inverse with exact damping."""
        return super().inverse(damping, use_heuristic_damping, min_damping, use_exact_damping)


class KFACInverseLinearOperator(Inverse):
    """Inverse of a KFAC or EKFAC matrix with damping.

    Args:
        A: `KFACLinearOperator` or `EKFACLinearOperator`.
        damping: Damping d of both factors, or a pair for the input and the output factor.
        use_heuristic_damping: Whether the factors have the dampings ``max(pi sqrt(d),
            min_damping)`` and ``max(sqrt(d) / pi, min_damping)``, with the root pi of the ratio of
            their mean eigenvalues (Martens and Grosse 2015, section 6.3).
        min_damping: Least damping of the heuristic.
        use_exact_damping: Whether to invert ``A (x) B + d I``; always for EKFAC.
        cache: Ignored: inverses are computed at the first product and kept.
        retry_double_precision: Ignored: factors are inverted in float64.

    Raises:
        ValueError: If the operator is no KFAC matrix, if options exclude each other, or if a
            damped matrix is singular. The last is raised by a product.
    """

    @validated(**CHECKS)
    def __init__(
        self,
        A: KFACLinearOperator,
        damping: float | tuple[float, float] = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        cache: bool = True,
        retry_double_precision: bool = True,
    ) -> None:
        if not isinstance(A, KFACLinearOperator):
            raise ValueError(
                f"A is a {type(A).__name__}, not a KFACLinearOperator: use CGInverseLinearOperator"
            )
        super().__init__(A)
        if use_heuristic_damping and use_exact_damping:
            raise ValueError("heuristic and exact damping exclude each other: choose one")
        if isinstance(damping, tuple) and (use_heuristic_damping or use_exact_damping):
            raise ValueError(
                f"damping={damping} is a pair, but heuristic and exact damping need one number: "
                "pass damping=1e-3"
            )
        if isinstance(A, EKFACLinearOperator) and not use_exact_damping:
            raise ValueError("EKFAC has exact damping only: pass use_exact_damping=True")
        self._kfac, self._damping, self._min_damping = A, damping, min_damping
        self._is_heuristic, self._is_exact = use_heuristic_damping, use_exact_damping

    @torch.no_grad()
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        product = self._matvec(block_of(X, list(self._kfac.params)))
        return columns([product[name] for name in self._kfac.params])

    @cached_property
    def _matvec(self) -> Matvec:
        blocks, damping = self._kfac.blocks, self._damping
        if self._is_exact and not isinstance(damping, tuple):
            return lambda block: blocks.inverse_matvec(block, damping)
        return inverse(blocks, self._dampings)

    def _dampings(self, name: str) -> tuple[float, float]:
        """Return the dampings of the input and the output factor of a parameter."""
        if isinstance(self._damping, tuple):
            return self._damping
        inputs = self._kfac._input_covariances.get(_module(name))
        if self._is_heuristic and inputs is not None:
            # The bias shares the output factor of its weight, and its damping.
            outputs = self._kfac._gradient_covariances[_module(name)]
            sizes = [float(f.diagonal(dim1=-2, dim2=-1).mean()) for f in (inputs, outputs)]
            if min(sizes) > 0:
                pi, root = math.sqrt(sizes[0] / sizes[1]), math.sqrt(self._damping)
                return max(pi * root, self._min_damping), max(root / pi, self._min_damping)
        return self._damping, self._damping


def _member(name: str, kinds: type[_Kind], value: str) -> _Kind:
    try:
        return kinds(value)
    except ValueError:
        choices = ", ".join(repr(kind.value) for kind in kinds)
        raise ValueError(f"{name}={value!r}: choose one of {choices}") from None


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _single(factor: Tensor) -> Tensor:
    """Return the factor of the only group of a layer, or those of all groups."""
    factor = torch.diag_embed(factor) if factor.dim() == 2 else factor
    return factor[0] if len(factor) == 1 else factor
