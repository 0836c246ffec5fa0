"""What a run will take on each rank, from the sizes of everything: memory, wire, time.

Nothing is measured here and nothing is loaded, torch included: a plan is made before there is a
machine. `hessfunc plan` prints it, docs/planning.md compares it with what was measured.
"""

from hessfunc.app.plan.algorithms import Algorithm, Hutchinson, Lanczos, Slq, Xtrace
from hessfunc.app.plan.footprint import Moment, Setting
from hessfunc.app.plan.machine import Cost, Machine, Work, gradient_seconds
from hessfunc.app.plan.network import BYTES, Network, Transformer
from hessfunc.app.plan.remedies import Plan, Remedy, fewest_ranks, plan, remedies, whole

__all__ = [
    "Algorithm",
    "BYTES",
    "Cost",
    "Hutchinson",
    "Lanczos",
    "Machine",
    "Moment",
    "Network",
    "Plan",
    "Remedy",
    "Setting",
    "Slq",
    "Transformer",
    "Work",
    "Xtrace",
    "fewest_ranks",
    "gradient_seconds",
    "plan",
    "remedies",
    "whole",
]
