"""Types of the family `results`, which is imported from `hessfunc.algorithms.results`."""

from hessfunc.algorithms.results import *
