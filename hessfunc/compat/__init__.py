"""Drop-in replacements for other libraries, and conversion to and from NumPy and SciPy.

A script that uses another library runs after its import is changed, for example to
``from hessfunc.compat.pyhessian import hessian``.
"""

from hessfunc.compat.scipy import from_numpy, from_scipy, to_scipy

__all__ = ["from_numpy", "from_scipy", "to_scipy"]
