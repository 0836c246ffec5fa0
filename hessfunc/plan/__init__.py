"""What a run will take on each rank, from the sizes of everything: memory, wire, time.

Nothing is measured here and nothing is loaded, torch included: a plan is made before there is a
machine. `hessfunc plan` prints it, docs/planning.md compares it with what was measured.
"""

from hessfunc.plan.algorithms import Algorithm, Hutchinson, Lanczos, Slq, Xtrace
from hessfunc.plan.machine import Cost, Machine, gradient_seconds
from hessfunc.plan.memory import Moment, Setting
from hessfunc.plan.network import BYTES, Network, Transformer
from hessfunc.plan.plans import Plan, plan
from hessfunc.plan.remedies import Remedy, fewest_ranks, remedies, whole
from hessfunc.plan.work import Work

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
