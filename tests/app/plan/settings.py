"""Networks of known sizes."""

from __future__ import annotations

from hessfunc.app.plan import Machine, Transformer

GIB = 2**30
SEVEN = Transformer.usual(7 * 10**9).network("float32", tokens=512, context=512)
RATES = Machine(gradient_seconds=1.0, memory_bandwidth=1e12, network_bandwidth=1e10, latency=1e-5)
