"""Types of the family `attached`, which is imported from `hessfunc.algorithms.attached`."""

from hessfunc.algorithms.attached import *
