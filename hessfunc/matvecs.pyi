"""Types of the family `matvecs`, which is imported from `hessfunc.transforms.matvecs`."""

from hessfunc.transforms.matvecs import *
