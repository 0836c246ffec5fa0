"""Products that are counted where another library makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Counted:
    """A function that counts its calls."""

    function: Callable[..., Any]
    count: int = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        return self.function(*arguments, **options)
