"""Cells of memory beside time: modes of ours, sizes of chunks, and other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

import hessfunc as hf
from bench.speed import models, ours, plain
from bench.speed.asked import Alternative, Asked, Work
from bench.speed.cells import Cell
from bench.speed.device import device
from bench.speed.peak import peak_above, peak_of
from bench.speed.peers import backpack, curvlinops, eigenthings, pyhessian
from bench.speed.products import cell_of
from bench.speed.turns import Effort, reason_of


def memory(name: str, effort: Effort) -> Cell:
    """The time and the peak of memory of each way to a Hessian product, and of a block."""
    asked = _asked(name)
    cell = cell_of(asked, list(_alternatives(name).values()), effort)
    rows, gaps = dict(cell.rows), dict(cell.gaps)
    for title, row in rows.items():
        try:
            rows[title] = replace(row, bytes=peak_of(f"memory/{name}", title))
        except (OSError, RuntimeError) as broken:
            gaps[f"{title}: memory"] = reason_of(broken)
    return replace(cell, rows=rows, gaps=gaps)


def peak(question: str, name: str, alternative: str) -> int:
    """That of one alternative in this process."""
    if question == "basis":
        return basis_peak(int(name))
    asked, make = _asked(name), _alternatives(name)[alternative].make
    asked.rows(), asked.columns()

    def call() -> tuple[Work, object]:
        work = make(asked)
        return work, work.call()

    call()
    for parameter in asked.case.parameters:
        parameter.grad = None
    return peak_above(call)


def basis_peak(size: int, n: int = 500_000) -> int:
    """That of Lanczos with a basis of so many vectors, on a matrix that takes no memory."""
    diagonal = torch.linspace(0, 1, n, device=device())
    # So small a tolerance is not met: the basis is filled.
    return peak_above(
        lambda: hf.lanczos(
            lambda block: diagonal * block,
            diagonal,
            k=1,
            basis_size=size,
            max_matvecs=size,
            rtol=1e-12,
            seed=0,
        )
    )


def _asked(name: str) -> Asked:
    return Asked(models.made(name), k=models.MODELS[name].block)


def _alternatives(name: str) -> Mapping[str, Alternative]:
    block = models.MODELS[name].block
    found = [
        *ours.MODES(block),
        *pyhessian.PRODUCTS,
        *eigenthings.PRODUCTS,
        *backpack.PRODUCTS,
        *curvlinops.MODES(block),
        *plain.PRODUCTS,
    ]
    return {alternative.title: alternative for alternative in found}
