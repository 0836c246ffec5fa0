"""Drop-in replacement for curvlinops 3.0.

A script changes only its imports:

    from hessfunc.compat.curvlinops import GGNLinearOperator    # from curvlinops import ...
    from hessfunc.compat.curvlinops.examples import gradient_and_loss

Products, shapes and formats are the same: flat vectors, matrices of columns, and lists of tensors,
with an axis of columns last. Parameters may also be a dict, as in later versions, and vectors are
then dicts as well. Constructors accept the arguments of version 3.0.1 in its order.
"""

from hessfunc.compat.curvlinops.curvature import CurvatureLinearOperator
from hessfunc.compat.curvlinops.estimators import (
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from hessfunc.compat.curvlinops.inverse import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from hessfunc.compat.curvlinops.jacobian import (
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from hessfunc.compat.curvlinops.kfac import (
    EKFACLinearOperator,
    FisherType,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
)
from hessfunc.compat.curvlinops.matrices import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)
from hessfunc.compat.curvlinops.operator import PyTorchLinearOperator
from hessfunc.compat.curvlinops.spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from hessfunc.compat.curvlinops.submatrix import SubmatrixLinearOperator

__all__ = [
    # Matrices of a model, a loss and data
    "HessianLinearOperator",
    "GGNLinearOperator",
    "EFLinearOperator",
    "FisherMCLinearOperator",
    "KFACLinearOperator",
    "EKFACLinearOperator",
    "JacobianLinearOperator",
    "TransposedJacobianLinearOperator",
    "FisherType",
    "KFACType",
    # Classes for operators of one's own
    "PyTorchLinearOperator",
    "CurvatureLinearOperator",
    # Inverses and submatrices
    "CGInverseLinearOperator",
    "LSMRInverseLinearOperator",
    "NeumannInverseLinearOperator",
    "KFACInverseLinearOperator",
    "SubmatrixLinearOperator",
    # Spectral densities
    "lanczos_approximate_spectrum",
    "lanczos_approximate_log_spectrum",
    "LanczosApproximateSpectrumCached",
    "LanczosApproximateLogSpectrumCached",
    # Traces, diagonals and norms
    "hutchinson_trace",
    "hutchpp_trace",
    "xtrace",
    "hutchinson_diag",
    "xdiag",
    "hutchinson_squared_fro",
]
