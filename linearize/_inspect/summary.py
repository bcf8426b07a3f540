"""What a linearization keeps and what its products cost, in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from .._execute.binding import BoundProgram
from .._text.tables import as_html, as_text, bars, code, fewer, framed, size
from ..errors import ClosedError, LinearizeError
from .cost import Cost, cost_of, cost_table, known_of, operation_table, operations_as_html
from .kept import HINT, Residuals


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a linearization keeps and what its products cost. Print it for tables.

    Attributes
    ----------
    name
        Of the function.
    map
        The spaces of tangents and cotangents, as text.
    costs
        For "pushforward" (one J·v) and "pullback" (one Jᵀ·u) the cost, estimated from shapes;
        a text instead where that product cannot be had.
    residuals
        What is kept.
    """

    name: str
    map: str
    costs: dict[str, Cost | str]
    residuals: Residuals

    @property
    def operations(self) -> dict[str, dict[str, int]]:
        """How often each operation occurs in each program, the most frequent first."""
        return {k: c.operations for k, c in known_of(self.costs).items()}

    def __str__(self) -> str:
        residuals = self.residuals
        lines = [
            f"{self.name}: {self.map}",
            "",
            as_text(*cost_table(self.costs), right=range(1, 7)),
        ]
        lines += [f"{k}: {c}" for k, c in self.costs.items() if isinstance(c, str)]
        lines += ["(estimated from shapes, for one product)", ""]
        head, rows = operation_table(self.costs)
        lines += [as_text(head, rows, right=range(1, 3)), "", residuals._headline()]
        columns, sizes = self._memory()
        lines.append(as_text(columns, [(label, size(n)) for label, n in sizes], right=(1,)))
        return "\n".join([*lines, *([] if residuals.traced else [HINT])])

    def _repr_html_(self) -> str:
        title = f"<p><strong>{code(self.name)}</strong> {code(self.map)}</p>"
        return framed(title + self._html())

    def _html(self) -> str:
        parts = [as_html(*cost_table(self.costs), right=range(1, 7))]
        for direction, c in self.costs.items():
            if isinstance(c, str):
                parts.append(as_html([direction], [[c]]))
        parts.append('<p class="lz-faint">Estimated from shapes, for one product.</p>')
        return "".join([*parts, operations_as_html(self.costs), self._memory_html()])

    def _memory_html(self) -> str:
        residuals = self.residuals
        (what, unit), sizes = self._memory()
        chart = bars([(code(label), n) for label, n in sizes], (what, unit))
        hint = "" if residuals.traced else f'<p class="lz-faint">{HINT}</p>'
        return f"<p>{residuals._headline()}</p>{chart}{hint}"

    def _memory(self) -> tuple[tuple[str, str], list[tuple[str, int]]]:
        residuals = self.residuals
        traced = residuals.traced
        sizes = list((residuals.by_line() if traced else residuals.by_operation()).items())
        return ("line of f" if traced else "kept by", "bytes"), fewer(sizes)

    def __repr__(self) -> str:
        return f"<Summary of {self.name}: {self.residuals._headline()}>"


def costs(programs: Mapping[str, Callable[[], BoundProgram]]) -> dict[str, Cost | str]:
    """Return what one run of each program costs; the error's text where it cannot be had."""
    found: dict[str, Cost | str] = {}
    for name, program in programs.items():
        try:
            found[name] = cost_of(program())
        except ClosedError:
            raise
        except LinearizeError as error:
            found[name] = str(error)
    return found
