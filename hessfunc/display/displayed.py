"""Common displays of everything that the library returns, all of them from the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hessfunc.display.html import page
from hessfunc.display.plain import plain
from hessfunc.options import flag, validated

if TYPE_CHECKING:
    import pandas as pd

# Metadata of a dataclass field whose tensors have the structure of the parameters.
VECTORS = {"vectors": True}


def shown(numbers: Tensor, digits: int = 6) -> str:
    """Return the first ten numbers of a vector as text."""
    first = [f"{x:.{digits}g}" for x in numbers[:10].tolist()]
    return f"[{', '.join([*first, '...'] if len(numbers) > 10 else first)}]"


class Displayed:
    """Base class of results: text, HTML for notebooks, plain data and tables.

    A result defines the rows of its summary and the columns of its table; all displays follow from
    them.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """Return the summary as text, without vectors and samples."""
        parts = (f"{name}={_quoted(text)}" for name, text in self._summary().items())
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return the summary as HTML, which notebooks show instead of the text."""
        return page(type(self).__name__, self._summary(), self._sparkline())

    @validated(vectors=flag)
    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return all fields as plain Python: numbers, text, None, lists and dicts.

        ``json.dumps`` writes the answer. It loses the dtype and the device of tensors; tuples
        become lists, keys become strings, and containers other than dicts and lists become dicts.
        Numbers in bfloat16 and float32 are kept exactly. NaN and infinity remain floats, which
        ``json`` writes as ``NaN`` and ``Infinity``. Use ``save`` and `load` to lose nothing.

        Args:
            vectors: Whether trees with the structure of the parameters are included, such as
                eigenvectors. A Python list takes about 32 bytes for each number.

        Returns:
            Dict with the name of the class as ``"kind"``, and the fields by name.
        """
        result: Any = self
        kept = {
            item.name: plain(getattr(result, item.name), vectors=vectors)
            for item in fields(result)
            if vectors or not item.metadata.get("vectors")
        }
        return {"kind": type(self).__name__, **kept}

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy table, with one row for each observation of the result.

        A row is an eigenvalue, a Ritz value of a probe, the contribution of a leaf, a right-hand
        side, a point of a landscape or a step of a training. Vectors are left out, except the
        entries of a diagonal.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError:
            raise ModuleNotFoundError("tables need pandas: `pip install pandas`") from None
        return pd.DataFrame(dict(self._columns()))

    def _summary(self) -> dict[str, str]:
        """Return the names and the texts of the rows of the summary."""
        return {name: str(value) for name, value in self._headline().items()}

    def _headline(self) -> Mapping[str, object]:
        """Return the names and values that the summary begins with."""
        return {}

    def _sparkline(self) -> str | None:
        """Return a small figure of the result as SVG, or None."""
        return None

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        """Return the columns of the table; by default one row with all numbers and texts."""
        scalars = {
            name: [value]
            for name, value in self.to_dict(vectors=False).items()
            if value is None or isinstance(value, int | float | str)
        }
        scalars.pop("kind")
        return scalars


def _quoted(text: str) -> str:
    """Return the text of a row with quotes if it is a sentence, not numbers or a list."""
    return repr(text) if " " in text and text[0].isalpha() else text
