"""What is compared: the same blocks by ours and by another library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bench.blocks import ours
from bench.blocks.peers import backpack, curvlinops
from bench.blocks.problems import Problem, problem
from hessfunc.randomness import seeded

# What is prepared once, outside of the time -> what is timed.
Work: TypeAlias = Callable[[Problem], Callable[[], Any]]

DAMPING = 1e-2


@dataclass(frozen=True)
class Question:
    """One matrix, by ours in one or several ways and by another library.

    Attributes:
        title: of the matrix.
        peer: the other library.
        ours: the ways of ours, by name.
        theirs: the other library's.
        errors: of the name of a problem: relative to the other library, in float64; the largest
            of a parameter. By what is compared.
        unasked: why a problem is left out, or nothing.
    """

    title: str
    peer: str
    ours: Mapping[str, Work]
    theirs: Work
    errors: Callable[[str], Mapping[str, float | str]]
    unasked: Callable[[str], str] = lambda name: ""

    @property
    def alternatives(self) -> dict[str, Work]:
        return {**self.ours, self.peer: self.theirs}


def _error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(
        float((found[name] - target.detach()).norm() / target.detach().norm())
        for name, target in expected.items()
    )


def _double(name: str, examples: int | None = None) -> Problem:
    return problem(name, torch.float64, examples)


def _varied(case: Problem) -> Problem:
    """The same net on random images, whose second moments are far from singular."""
    with seeded(2):
        return replace(case, inputs=torch.randn_like(case.inputs))


def _drawn(name: str) -> Mapping[str, str]:
    return {"": "draws differ"}


def _no_gelu(name: str) -> str:
    return "BackPACK has no GELU" if _double(name, 1).has(nn.GELU) else ""


def _no_positions(name: str) -> str:
    return "" if _double(name, 1).has(nn.Conv2d) else "as expand: weights act on one position"


def _no_kfra(name: str) -> str:
    if name == "3c3d":
        return "not run: a matrix of 53,824 x 53,824, the outputs of the first ZeroPad2d, on both"
    return _no_gelu(name)


def _backpack_factors(kind: str) -> Question:
    def errors(name: str) -> Mapping[str, float]:
        case = _double(name)
        vectors = case.vectors(2)
        factors = backpack.extended(case, kind.upper())()
        expected = backpack.factored_products(factors, vectors)
        return {"": _error(ours.recombined(case, kind)(vectors), expected)}

    draws = kind == "kfac"
    return Question(
        f"{kind.upper()}{', 1 draw' if draws else ''}",
        "BackPACK",
        {"ours": partial(ours.made, kind=kind, **({"seed": 0} if draws else {}))},
        partial(backpack.extended, extension=kind.upper()),
        _drawn if draws else errors,
        _no_kfra if kind == "kfra" else _no_gelu,
    )


def _curvlinops_factors(kind: str, sharing: str) -> Question:
    draws, corrected = kind == "kfac", kind == "ekfac"
    options = {"fisher_type": "mc" if draws else "type-2", "corrected": corrected}

    def errors(name: str) -> Mapping[str, float | str]:
        # Where A is singular its eigenvectors, and so the blocks of EKFAC, are not unique.
        unique = not corrected or sharing == "expand" or name != "3c3d"
        if not unique:
            return {"": "not unique: A is singular"}
        case = _double(name)
        if corrected and case.has(nn.Conv2d) and sharing == "reduce":
            case = _varied(_double(name, 512))
        vectors = case.vectors(2)
        operator = curvlinops.factored(case, sharing=sharing, **options)()
        blocks = ours.made(case, kind, sharing=sharing)()
        return {"": _error(blocks(vectors), curvlinops.products(operator, vectors))}

    titles = {"kflr": "KFLR", "kfac": "KFAC, 1 draw", "ekfac": "EKFAC of KFLR"}
    return Question(
        f"{titles[kind]}, {sharing}",
        "curvlinops",
        {"ours": partial(ours.made, kind=kind, sharing=sharing, **({"seed": 0} if draws else {}))},
        partial(curvlinops.factored, sharing=sharing, **options),
        _drawn if draws else errors,
        _no_positions if sharing == "reduce" else lambda name: "",
    )


def _inverse(*, again: bool) -> Question:
    def our_work(case: Problem) -> Callable[[], object]:
        blocks, vectors = ours.made(case, "kflr")(), case.vectors(1)
        if again:
            return lambda: blocks.inverse_matvec(vectors, DAMPING)
        return lambda: ours.fresh(blocks).inverse_matvec(vectors, DAMPING)

    def their_work(case: Problem) -> Callable[[], object]:
        operator = curvlinops.factored(case, "type-2", "expand")()
        columns = curvlinops.columns(case.vectors(1))
        kept = curvlinops.inverse(operator, DAMPING)
        if again:
            return lambda: kept @ columns
        return lambda: curvlinops.inverse(operator, DAMPING) @ columns

    def errors(name: str) -> Mapping[str, float]:
        case = _double(name)
        vectors = case.vectors(2)
        operator = curvlinops.factored(case, "type-2", "expand")()
        expected = curvlinops.products(curvlinops.inverse(operator, DAMPING), vectors)
        return {"": _error(ours.made(case, "kflr")().inverse_matvec(vectors, DAMPING), expected)}

    return Question(
        f"(KFLR + {DAMPING} I)^-1 v, {'again' if again else 'first'}",
        "curvlinops",
        {"ours": our_work},
        their_work,
        errors,
    )


def _products(kind: str, repeats: int) -> Question:
    def errors(name: str) -> Mapping[str, float]:
        case = _double(name)
        found = ours.apart(case, kind, 1)()
        expected = backpack.product_functions(case, kind, 1)()
        error = {"": _error(found, expected)}
        # What multiplies by the gradient twice shows where phi'' is not zero.
        if kind == "PCHMP" and not case.has(nn.ReLU):
            with backpack.gradient_once():
                expected = backpack.product_functions(case, kind, 1)()
            return {"as shipped": error[""], "gradient once": _error(found, expected)}
        return error

    def unasked(name: str) -> str:
        if name == "3c3d" and repeats > 1 and kind != "HMP":
            return "left out for its time"
        return _no_gelu(name)

    options = {"kind": kind, "repeats": repeats}
    return Question(
        f"{kind}, {repeats} product{'s' if repeats > 1 else ''}",
        "BackPACK",
        {
            "ours, held": partial(ours.apart, **options),
            "ours, all": partial(ours.at_once, **options),
        },
        partial(backpack.product_functions, extension=kind, repeats=repeats),
        errors,
        unasked,
    )


QUESTIONS: list[Question] = [
    *(_backpack_factors(kind) for kind in ("kflr", "kfra", "kfac")),
    *(
        _curvlinops_factors(kind, sharing)
        for kind in ("kflr", "kfac", "ekfac")
        for sharing in ("expand", "reduce")
    ),
    *(_inverse(again=again) for again in (False, True)),
    *(_products(kind, repeats) for kind in ours.CURVATURES for repeats in (1, 10)),
]
