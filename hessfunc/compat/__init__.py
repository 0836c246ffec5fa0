"""Drop-in replacements for other libraries, and operators of SciPy.

A script that uses another library runs with its import changed, for instance to
``from hessfunc.compat.pyhessian import hessian``.
"""

from hessfunc.compat.scipy import from_scipy, to_scipy

__all__ = ["from_scipy", "to_scipy"]
