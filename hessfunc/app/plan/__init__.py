"""Estimates of the memory, communication and time that a run takes on each rank.

A plan follows from sizes alone. It measures and loads nothing, not even torch, so it can be made
before a machine is available. `hessfunc plan` prints it; docs/planning.md compares plans with
measurements.
"""

from hessfunc.app.plan.algorithms import Algorithm, Hutchinson, Lanczos, PowerIteration, Slq, Xtrace
from hessfunc.app.plan.footprint import Moment, Setting
from hessfunc.app.plan.machine import Machine, RunCost, Workload, gradient_seconds
from hessfunc.app.plan.network import BYTES, Network, Transformer
from hessfunc.app.plan.remedies import Plan, Remedy, cheapest, fewest_ranks, plan, remedies, whole

__all__ = [
    "Algorithm",
    "BYTES",
    "RunCost",
    "Hutchinson",
    "Lanczos",
    "Machine",
    "Moment",
    "Network",
    "Plan",
    "PowerIteration",
    "Remedy",
    "Setting",
    "Slq",
    "Transformer",
    "Workload",
    "Xtrace",
    "cheapest",
    "fewest_ranks",
    "gradient_seconds",
    "plan",
    "remedies",
    "whole",
]
