"""Curvature matrices: functions ``loss -> (params, batch) -> matvec``.

`chunks` decides how many vectors go through one pass; `differentiable` does so for products that
carry a graph. `criteria` has the closed forms of output Hessians.
"""
